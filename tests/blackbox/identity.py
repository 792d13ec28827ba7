"""Connection strings and SAS tokens, made independently of the program and of the SDK."""

import base64
import hashlib
import hmac
import time
import urllib.parse
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Identity:
    """A device or module with its key, or without one if it proves itself by certificate."""

    host: str
    device: str
    module: str | None
    key: str

    @classmethod
    def parse(cls, text):
        parts = dict(part.split("=", 1) for part in text.strip().split(";") if part)
        return cls(parts["HostName"], parts["DeviceId"], parts.get("ModuleId"), parts.get("SharedAccessKey"))

    @property
    def client_id(self):
        return f"{self.device}/{self.module}" if self.module else self.device

    @property
    def events_topic(self):
        module = f"/modules/{self.module}" if self.module else ""
        return f"devices/{self.device}{module}/messages/events/"

    @property
    def username(self):
        return f"{self.host}/{self.client_id}/?api-version=2021-04-12"

    def with_other_key(self):
        return replace(self, key=base64.b64encode(b"another key altogether, 32 bytes").decode())

    def connection_string(self, gateway=None):
        text = f"HostName={self.host};DeviceId={self.device}"
        if self.module:
            text += f";ModuleId={self.module}"
        text += f";SharedAccessKey={self.key}"
        return text + (f";GatewayHostName={gateway}" if gateway else "")

    def token(self, expires_at=None):
        """A SAS token that expires at a Unix time; in an hour if not told."""
        expires_at = int(expires_at if expires_at is not None else time.time() + 3600)
        audience = f"{self.host}/devices/{self.device}" + (f"/modules/{self.module}" if self.module else "")
        resource = urllib.parse.quote(audience, safe="")
        signature = hmac.new(base64.b64decode(self.key), f"{resource}\n{expires_at}".encode(), hashlib.sha256)
        encoded = urllib.parse.quote(base64.b64encode(signature.digest()).decode(), safe="")
        return f"SharedAccessSignature sr={resource}&sig={encoded}&se={expires_at}"
