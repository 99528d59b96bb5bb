"""The form that a file is uploaded with, as pveproxy takes it."""

from __future__ import annotations

import secrets
from email import message_from_bytes
from email.message import Message

from ..state import paths
from .errors import Unsupported


def read(headers: Message, body: bytes) -> dict[str, str] | None:
    """The parameters of the call, the file itself lying at `tmpfilename`; None for no such form.

    A checksum in front of its algorithm is none (recordings ownL-038, ownL-039).
    """
    boundary = headers.get_boundary()
    if not boundary:
        return None
    mark = b"\r\n--" + boundary.encode()
    fields: dict[str, str] = {}
    for part in (b"\r\n" + body).split(mark)[1:]:
        head, found, content = part.partition(b"\r\n\r\n")
        about = message_from_bytes(head.lstrip(b"\r\n") + b"\r\n\r\n")
        name = about.get_param("name", header="content-disposition")
        if not found or not isinstance(name, str):
            continue
        if name != "filename":
            fields[name] = content.decode("utf-8", "replace")
            if name == "checksum" and "checksum-algorithm" not in fields:
                return None
            continue
        if "checksum" in fields:
            raise Unsupported("uploads with a checksum")
        file = about.get_filename()
        if not file or "content" not in fields:
            return None
        place = f"/var/tmp/pveupload-{secrets.token_hex(16)}"
        target = paths.at(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return {**fields, "filename": file, "tmpfilename": place}
    return None
