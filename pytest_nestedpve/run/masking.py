"""The masking of secrets in text before it is written or shown: known secrets, and some by their form."""

from __future__ import annotations

import base64
import json
import re
import threading
from typing import Any
from urllib.parse import quote

MASK = "********"
SHORTEST = 4

#: Groups: the text before the password, the @ after it. A password may contain @; it ends with a JSON string.
PASSWORD_IN_ADDRESS = re.compile(r'((?:https?|ssh|git)://[^/\s:@]*:)(?:[^/\s"\\]|\\.)+(@)')
_IN_PLAIN_TEXT = re.compile(r"((?:https?|ssh|git)://[^/\s:@]*:)[^/\s]+(@)")

# Text that is secret by its form: (pattern, replacement).
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)"
        ),
        f"[private key {MASK}]",
    ),
    (re.compile(r"(PVEAPIToken[=:]\s*[^\s=!]+![^\s=]+[=:])[^\s'\"]+"), rf"\g<1>{MASK}"),
    (re.compile(r"(PVEAuthCookie=)[^\s;'\"]+"), rf"\g<1>{MASK}"),
    (
        re.compile(
            r"((?:--|\b)(?:cipassword|password|passphrase|api_token|secret)[= ]\s*)(?!\*)[^\s,;&]+", re.I
        ),
        rf"\g<1>{MASK}",
    ),
    (re.compile(r"(\$(?:1|2[aby]|5|6|y|gy)\$)[^\s:'\"]{8,}"), rf"\g<1>{MASK}"),
    (_IN_PLAIN_TEXT, rf"\g<1>{MASK}\g<2>"),
)
_SECRET_KEYS = re.compile(r"(?i)(?:^|[_-])(?:password|cipassword|passphrase|secret|token_value|private_key)$")


class Masker:
    """Replaces secrets by asterisks. Thread-safe; a secret cannot be removed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forms: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Masker of {len(self._forms)} forms>"

    def add(self, secret: str | bytes | None) -> None:
        """Mask `secret` from now on, also URL-quoted, JSON-escaped, in base64; and each of its long lines.

        Texts shorter than 4 characters are ignored: masking them would mask everything.
        """
        if secret is None:
            return
        text = secret.decode("utf-8", "replace") if isinstance(secret, bytes) else secret
        parts = {text, text.strip(), *(line.strip() for line in text.splitlines() if len(line.strip()) >= 12)}
        forms: set[str] = set()
        for part in parts:
            if len(part) >= SHORTEST:
                forms |= {part, quote(part, safe=""), quote(part), json.dumps(part)[1:-1]}
                forms.add(base64.b64encode(part.encode()).decode())
        with self._lock:
            self._forms = tuple(sorted({*self._forms, *forms}, key=len, reverse=True))

    def mask(self, text: str) -> str:
        """`text` without secrets."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        for pattern, replacement in _SHAPES:
            text = pattern.sub(replacement, text)
        return text

    def mask_data(self, value: Any) -> Any:
        """`value` with its strings masked, in lists and dicts too; all below keys such as `password`."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, dict):
            return {
                self.mask(str(key)): MASK if _SECRET_KEYS.search(str(key)) and part else self.mask_data(part)
                for key, part in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.mask_data(part) for part in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self.mask(str(value))
