collect_ignore = ["llama_model.py"]  # which needs llama.cpp
