//! Owns the text that tells a visitor how to connect clients of their own.

use super::site::{HUB_NAME, Site};

/// Connection strings, certificate and ready-made lines; empty unless the site has identities for the visitor.
pub(super) fn instructions(site: &Site) -> Vec<String> {
    let Some((device, module)) = &site.own else { return Vec::new() };
    let (device, module) = (device.text(Some(HUB_NAME)), module.text(Some(HUB_NAME)));
    let root = site.file("ca.pem");
    let root = root.display();
    let text = format!(
        r#"
Connect your own clients (MQTT over TLS, {HUB_NAME}:{port}):
  root certificate   {root}
  device             {device}
  module             {module}

With Python (pip install azure-iot-device). A module that prints what the device sends:

from azure.iot.device import IoTHubModuleClient
root = open("{root}").read()
module = IoTHubModuleClient.create_from_connection_string("{module}", server_verification_cert=root)
module.connect()
module.on_message_received = lambda message: print(message.input_name, message.data)

And, in another Python, the device; what it sends also goes to the cloud stand-in:

from azure.iot.device import IoTHubDeviceClient
root = open("{root}").read()
device = IoTHubDeviceClient.create_from_connection_string("{device}", server_verification_cert=root)
device.connect()
device.send_message('{{"hello": "edge"}}')

Hub: http://{pages}/status   Ctrl-C ends everything and shows the table.
"#,
        port = site.ports.hub_mqtt.port(),
        pages = site.ports.hub_pages,
    );
    text.lines().map(str::to_owned).collect()
}
