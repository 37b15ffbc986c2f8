"""HTTP server: the endpoints, the queue that batches requests, and the limits on what requests may hold.

Imports ClipModel and what it uses; the one folder that imports Starlette, Pydantic, Uvicorn and HTTPX.
"""
