"""The application: routes, the shape of errors, and the guard around all of it."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import sememe
from sememe.serving import chat, coding, completions, native, page
from sememe.serving.errors import ApiError, on_api, on_http, on_invalid
from sememe.serving.guard import Guard
from sememe.serving.service import Service


def build_app(service: Service) -> Guard:
    """ASGI. Its routes are in `.app.routes`."""
    # The pages that FastAPI would serve for its documentation load scripts from other hosts.
    app = FastAPI(title="sememe", version=sememe.__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    for part in (completions, chat, coding, native, page):
        app.include_router(part.router)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ApiError, on_api)
    return Guard(app, service.settings, service.metrics.outcome)
