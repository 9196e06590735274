"""The routers of all older services."""

from app.web.compat import custom_llm, generate, inference_api, llm_server

ROUTERS = (generate.router, inference_api.router, custom_llm.router, llm_server.router)
