"""check_pveproxy.py PATH [DIRECTORY [PORT]]: check that pveproxy answers at PATH with a trusted certificate.

Runs on a PVE node, with the node's Python. For a path of the API it reads a token from standard input. The exit
status is 0, or an error is printed on standard error.
"""

import http.client
import os
import re
import ssl
import sys


def trust(directory):
    own = os.path.join(directory, "local/pveproxy-ssl.pem")
    if not os.path.exists(own):
        context = ssl.create_default_context(cafile=os.path.join(directory, "pve-root-ca.pem"))
    else:
        # An administrator's certificate need not contain 127.0.0.1, and its issuer is not checked: it is pinned.
        with open(own) as file:
            served = re.search("-----BEGIN CERT.*?-----END CERT[A-Z]*-----", file.read(), re.DOTALL)
        context = ssl.create_default_context(cadata=served.group() if served else "")
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.check_hostname = False
    # Authorities created before pve-cluster 9.1.2 lack the key usage that strict checks require.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def main(path, directory="/etc/pve", port="8006"):
    headers = {}
    if path.startswith("/api2/"):
        headers["Authorization"] = "PVEAPIToken=" + sys.stdin.read().strip()
    try:
        connection = http.client.HTTPSConnection("127.0.0.1", int(port), timeout=20, context=trust(directory))
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
    except (OSError, ssl.SSLError, http.client.HTTPException) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if answer.status != 200:
        sys.exit(f"expected 200, found {answer.status} {answer.reason}")


main(*sys.argv[1:])
