"""The engine that is another server with OpenAI's routes: vLLM, SGLang, TGI, llama.cpp, Ollama, another one of ours."""
