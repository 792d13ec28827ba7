"""A throw-away root, and certificates of servers and clients."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=2)
HOUR = datetime.timedelta(hours=1)


class Authority:
    """Signs certificates; `root` is the file that clients trust."""

    def __init__(self, folder: Path, name="black-box root", lifetime=LIFETIME, since=HOUR):
        """`lifetime` from now on and `since` before now are what its certificates have, unless told otherwise."""
        self._folder, self._lifetime, self._since = folder, lifetime, since
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        root = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.root = folder / "root.pem"
        self.root_pem = root.public_bytes(serialization.Encoding.PEM)
        self.root.write_bytes(self.root_pem)

    def _builder(self, name, key, issuer=None, lifetime=None, since=None):
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer or self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - (since or self._since))
            .not_valid_after(now + (lifetime or self._lifetime))
        )

    def client(self, file_stem, common_name, self_signed=False, expired=False):
        """A certificate for a client; returns the files of chain and key, and its thumbprints."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        lifetime = datetime.timedelta(minutes=-1) if expired else None
        certificate = (
            self._builder(name, key, name if self_signed else self._name, lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key if self_signed else self._key, hashes.SHA256())
        )
        files = self._write(file_stem, certificate, key, b"" if self_signed else self.root_pem)
        thumbprints = [certificate.fingerprint(kind).hex() for kind in (hashes.SHA1(), hashes.SHA256())]
        return files, thumbprints

    def server(self, file_stem, names, lifetime=None, since=None):
        """A certificate for host names and addresses, valid `since` ago; returns the files of chain and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = []
        for name in names:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), key, None, lifetime, since)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return self._write(file_stem, certificate, key, self.root_pem)

    def _write(self, file_stem, certificate, key, chain_pem):
        chain_file = self._folder / f"{file_stem}.pem"
        key_file = self._folder / f"{file_stem}.key"
        chain_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + chain_pem)
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return chain_file, key_file
