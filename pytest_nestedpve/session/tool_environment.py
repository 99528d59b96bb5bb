"""Environment variables that give other programs access to the nested PVE; each program has its own names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Api:
    """Access to the API. `token` is USER@REALM!NAME=SECRET; `authority` the PEM file of its certificate
    authority; `roots` maps each variable of ROOTS to a PEM file of the system's roots and that authority."""

    host: str
    port: int
    token: str = field(repr=False)
    authority: Path
    roots: Mapping[str, Path]

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    @property
    def token_id(self) -> str:
        return self.token.partition("=")[0]

    @property
    def secret(self) -> str:
        return self.token.partition("=")[2]

    @property
    def user(self) -> str:
        return self.token_id.partition("!")[0]

    @property
    def token_name(self) -> str:
        return self.token_id.partition("!")[2]


#: Variables that replace the system's roots: for OpenSSL and Go, for Python's requests, and for curl.
ROOTS = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def _bpg(api: Api) -> dict[str, str]:
    # https://github.com/bpg/terraform-provider-proxmox, docs/index.md; with a token it needs a user for SSH.
    return {
        "PROXMOX_VE_ENDPOINT": api.url + "/",
        "PROXMOX_VE_API_TOKEN": api.token,
        "PROXMOX_VE_SSH_USERNAME": "root",
        "SSL_CERT_FILE": str(api.roots["SSL_CERT_FILE"]),
    }


def _telmate(api: Api) -> dict[str, str]:
    # https://github.com/Telmate/terraform-provider-proxmox, docs/index.md
    return {
        "PM_API_URL": f"{api.url}/api2/json",
        "PM_API_TOKEN_ID": api.token_id,
        "PM_API_TOKEN_SECRET": api.secret,
        "SSL_CERT_FILE": str(api.roots["SSL_CERT_FILE"]),
    }


def _ansible(api: Api) -> dict[str, str]:
    # https://github.com/ansible-collections/community.proxmox: its modules read HOST and PORT, its inventory
    # plugin URL, both the others. The modules verify certificates only with VALIDATE_CERTS.
    return {
        "PROXMOX_HOST": api.host,
        "PROXMOX_PORT": str(api.port),
        "PROXMOX_URL": api.url,
        "PROXMOX_USER": api.user,
        "PROXMOX_TOKEN_ID": api.token_name,
        "PROXMOX_TOKEN_SECRET": api.secret,
        "PROXMOX_VALIDATE_CERTS": "true",
        "PROXMOX_CA_PATH": str(api.authority),
        "REQUESTS_CA_BUNDLE": str(api.roots["REQUESTS_CA_BUNDLE"]),
    }


def _proxmoxer(api: Api) -> dict[str, str]:
    # proxmoxer reads no variables: these are for the user's code that calls it.
    return {
        "PROXMOXER_HOST": f"{api.host}:{api.port}",
        "PROXMOXER_USER": api.user,
        "PROXMOXER_TOKEN_NAME": api.token_name,
        "PROXMOXER_TOKEN_VALUE": api.secret,
        "REQUESTS_CA_BUNDLE": str(api.roots["REQUESTS_CA_BUNDLE"]),
    }


CONSUMERS: Mapping[str, Callable[[Api], dict[str, str]]] = {
    "bpg": _bpg,
    "telmate": _telmate,
    "ansible": _ansible,
    "proxmoxer": _proxmoxer,
}

#: Variables of another PVE's credentials, with precedence over ours, or that disable checks of certificates.
FOREIGN = frozenset(
    {
        *(f"PROXMOX_VE_{name}" for name in ("USERNAME", "PASSWORD", "OTP", "INSECURE")),
        *(f"PROXMOX_VE_{name}" for name in ("AUTH_PAYLOAD", "AUTH_TICKET", "CSRF_PREVENTION_TOKEN")),
        *(f"PM_VE_{name}" for name in ("ENDPOINT", "API_TOKEN", "USERNAME", "PASSWORD", "OTP", "INSECURE")),
        *("PM_USER", "PM_PASS", "PM_OTP", "PM_OTP_PROMPT", "PM_TLS_INSECURE"),
        *("PROXMOX_PASSWORD", "PROXMOX_OTP"),
    }
)


def variables(
    api: Api, consumers: tuple[str, ...], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables for these consumers. Raises ValueError for an unknown one."""
    values = _no_proxy(api, environ)
    for name in consumers:
        if name not in CONSUMERS:
            raise ValueError(f"expected one of {', '.join(CONSUMERS)}; found {name!r}")
        values.update(CONSUMERS[name](api))
    return values


def _no_proxy(api: Api, environ: Mapping[str, str]) -> dict[str, str]:
    """`no_proxy` with the address of the forwards, if a proxy is configured; else empty."""
    if not any(name.lower() in ("https_proxy", "all_proxy") and value for name, value in environ.items()):
        return {}
    without = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in without.split(",") if host.strip()]
    if api.host not in hosts and "*" not in hosts:
        hosts.append(api.host)
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(hosts))
