"""Is this model's residual stream read and written where we think?"""
