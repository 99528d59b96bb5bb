"""The multipart form of a file upload, parsed as by pveproxy."""

from __future__ import annotations

import secrets
from email import message_from_bytes
from email.message import Message

from ..state import paths
from .errors import Unsupported


def read(headers: Message, body: bytes) -> dict[str, str] | None:
    """The parameters of the call, with the file written to `tmpfilename`; None for an invalid form.

    A checksum before its algorithm makes the form invalid (recordings ownL-038, ownL-039).
    """
    boundary = headers.get_boundary()
    if not boundary:
        return None
    delimiter = b"\r\n--" + boundary.encode()
    fields: dict[str, str] = {}
    for part in (b"\r\n" + body).split(delimiter)[1:]:
        head, separator, content = part.partition(b"\r\n\r\n")
        about = message_from_bytes(head.lstrip(b"\r\n") + b"\r\n\r\n")
        name = about.get_param("name", header="content-disposition")
        if not separator or not isinstance(name, str):
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
        temporary = f"/var/tmp/pveupload-{secrets.token_hex(16)}"
        target = paths.at(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return {**fields, "filename": file, "tmpfilename": temporary}
    return None
