"""HTTP server: the endpoints, the queue that batches requests, and the limits on requests.

Imports ClipModel and what it uses. No other folder imports Starlette, Pydantic, Uvicorn or HTTPX.
"""
