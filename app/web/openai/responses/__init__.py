"""OpenAI's Responses API: a request, its items, the response object and the events of its stream."""
