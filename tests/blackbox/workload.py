"""A site whose hub and modules have no keys: they are with the stand-in for the security daemon."""

from .process import Process
from .site import CLOUD_HOST, EDGE, Site

GENERATION = "637000000000000000"
# What a hub with a connection string has, and one of the agent's has not.
DEVELOPMENT = (
    "IotHubConnectionString", "EdgeHubDevServerCertificateFile", "EdgeHubDevServerPrivateKeyFile",
    "EdgeHubDevTrustBundleFile", "EDGEHUB_UPSTREAM__TRUST_FILE",
)  # fmt: skip


class WorkloadSite(Site):
    """The stand-in is not running until `start_daemon`."""

    def __init__(self, folder, routes, **options):
        super().__init__(folder, routes, **options)
        self.socket = folder / "workload.sock"
        self.root = self.cloud.data / "workload" / "root.pem"
        self.daemon = None

    @property
    def root_pem(self):
        return self.root.read_text()

    def module_environment(self, module, gateway=None):
        """What the agent gives to a module."""
        variables = {
            "IOTEDGE_DEVICEID": EDGE, "IOTEDGE_MODULEID": module, "IOTEDGE_MODULEGENERATIONID": GENERATION,
            "IOTEDGE_IOTHUBHOSTNAME": CLOUD_HOST, "IOTEDGE_WORKLOADURI": f"unix://{self.socket}",
            "IOTEDGE_APIVERSION": "2021-12-07", "IOTEDGE_AUTHSCHEME": "sasToken",
        }  # fmt: skip
        return variables | ({"IOTEDGE_GATEWAYHOSTNAME": gateway} if gateway else {})

    def environment(self):
        variables = super().environment()
        for name in DEVELOPMENT:
            del variables[name]
        return {**self.module_environment("$edgeHub"), **variables}

    def start_daemon(self):
        self.daemon = Process(
            "daemon",
            ["cloud", "workload", "--socket", self.socket, "--data-dir", self.cloud.data, "--host-name", CLOUD_HOST,
             "--device-id", EDGE, "--trust-file", self.authority.root],
            {}, self.folder / "daemon.log",
        )  # fmt: skip
        self.daemon.wait_ready("its socket is there", self.socket.exists)

    def close(self):
        try:
            super().close()
        finally:
            if self.daemon is not None:
                if self.daemon.running():
                    self.daemon.stop()
                self.daemon.assert_no_panic()
