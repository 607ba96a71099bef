collect_ignore = ["interpreted.py"]  # which needs Triton
