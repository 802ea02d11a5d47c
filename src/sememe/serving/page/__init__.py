"""The page at `/`: files that hold nothing of the model, and need no key."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

HERE = Path(__file__).parent
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/server.js": ("server.js", "text/javascript"),
    "/text.js": ("text.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
POLICY = (
    # Trusted types: the browser itself refuses to make markup of text.
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}

router = APIRouter()


def _serve(path: str, name: str, kind: str) -> None:
    content = (HERE / name).read_bytes()

    @router.get(path, include_in_schema=False)
    async def file():
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)


for _path, (_name, _kind) in FILES.items():
    _serve(_path, _name, _kind)
