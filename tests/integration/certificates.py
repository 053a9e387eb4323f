"""TLS certificates for a test, made with the openssl program."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


def _openssl(*arguments, directory):
    done = subprocess.run(["openssl", *map(str, arguments)], cwd=directory, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=30, check=False)
    assert done.returncode == 0, f"openssl {' '.join(map(str, arguments))}: {done.stderr}"


@dataclass
class Certificate:
    cert: Path  # PEM
    key: Path   # PEM, not encrypted


class Certificates:
    """A certificate authority in `directory`, and what it signed:

    ca        Certificate of the authority
    server    for 127.0.0.1, ::1 and localhost
    wrong     for a host of another name
    expired   as server, but no longer valid
    client    of the client named `client`
    other_ca  Certificate of an authority that signed none of them
    self_signed  as server, but signed by itself
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.ca = self._authority("ca")
        self.other_ca = self._authority("other_ca")
        here = "IP:127.0.0.1,IP:::1,DNS:localhost"
        self.server = self.issue("server", here)
        self.wrong = self.issue("wrong", "DNS:elsewhere.example")
        self.expired = self.issue("expired", here, days=-1)
        self.client = self.issue("client")
        self.self_signed = self._authority("self_signed", "-addext", f"subjectAltName={here}")

    def _key(self, name):
        key = self.directory / f"{name}.key"
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key, directory=self.directory)
        return key

    def _authority(self, name, *extensions):
        pair = Certificate(self.directory / f"{name}.crt", self._key(name))
        _openssl("req", "-x509", "-new", "-key", pair.key, "-subj", f"/CN=mqtt2mongo test {name}", "-days", 2,
                 *(extensions or ("-addext", "keyUsage=critical,keyCertSign,cRLSign")), "-out", pair.cert,
                 directory=self.directory)
        return pair

    def issue(self, name, names=None, days=2):
        """A certificate for common name `name`, with the given subject alternative names. Negative days: expired."""
        pair = Certificate(self.directory / f"{name}.crt", self._key(name))
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text("basicConstraints=CA:FALSE\n" + (f"subjectAltName={names}\n" if names else ""))
        _openssl("req", "-new", "-key", pair.key, "-subj", f"/CN={name}", "-out", request, directory=self.directory)
        _openssl("x509", "-req", "-in", request, "-CA", self.ca.cert, "-CAkey", self.ca.key, "-CAcreateserial", "-days", days,
                 "-extfile", extensions, "-out", pair.cert, directory=self.directory)
        return pair

    def revocation_list(self, *revoked):
        """A CRL (PEM) of the authority that revokes the given certificates, for the broker's `crlfile`."""
        (self.directory / "index.txt").touch()
        (self.directory / "crlnumber").write_text("01\n")
        settings = self.directory / "ca.conf"
        settings.write_text(
            "[ca]\ndefault_ca=this\n[this]\ndatabase=index.txt\ncrlnumber=crlnumber\n"
            f"default_md=sha256\ndefault_crl_days=2\ncertificate={self.ca.cert}\nprivate_key={self.ca.key}\n")
        for pair in revoked:
            _openssl("ca", "-config", settings, "-revoke", pair.cert, directory=self.directory)
        path = self.directory / "revoked.crl"
        _openssl("ca", "-config", settings, "-gencrl", "-out", path, directory=self.directory)
        return path
