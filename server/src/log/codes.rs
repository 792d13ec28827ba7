//! Owns the closed list of codes that warnings and errors carry.
//!
//! A code belongs to one place in the program and is never given to another, also when its place is gone: people have
//! it in alerts and run books. The thousands name the room: 1 program, 2 clients, 3 identities, 4 routes and
//! delivery, 5 upstream, 6 store, 7 stand-in for the cloud.

/// One code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// `EH` and four digits.
    pub code: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What to do.
    pub next: &'static str,
}

/// Finds a code.
pub fn find(code: &str) -> Option<&'static Code> {
    CODES.binary_search_by_key(&code, |known| known.code).ok().map(|at| &CODES[at])
}

/// Every code, in their order.
pub fn known() -> &'static [Code] {
    CODES
}

const fn code(code: &'static str, meaning: &'static str, next: &'static str) -> Code {
    Code { code, meaning, next }
}

const CODES: &[Code] = &[
    code("EH0000", "a library warns", "read its text"),
    code("EH1001", "the operator's socket cannot be opened", "set admin.socket, or free its path"),
    code("EH1002", "the log was installed already", "report it as a defect"),
    code(
        "EH1003",
        "a setting is unknown or not as it should be",
        "correct it; `edgehub config show` names its origin",
    ),
    code("EH1004", "the manifest has a part that is hardly meant", "correct the manifest"),
    code("EH1005", "the server certificate is not valid now", "renew it, or correct the clock"),
    code("EH1006", "a metrics recorder was installed already", "report it as a defect"),
    code("EH1007", "renewed certificate files cannot be used", "correct the files and send SIGHUP again"),
    code(
        "EH1008",
        "MQTT is open without TLS",
        "switch it off with listen.mqtt_plain = \"off\", unless it is wanted",
    ),
    code(
        "EH1009",
        "messages are in memory only and are lost when the process ends",
        "set usePersistentStorage to true",
    ),
    code(
        "EH1010",
        "AMQP is open without TLS",
        "switch it off with listen.amqp_plain = \"off\", unless it is wanted",
    ),
    code(
        "EH1011",
        "the workload API does not answer; the start waits for it",
        "start the security daemon, or look at IOTEDGE_WORKLOADURI",
    ),
    code(
        "EH1012",
        "the certificate of the workload API is not valid now",
        "correct the clock, or the daemon's certificates",
    ),
    code(
        "EH1013",
        "the trust bundle of the workload API cannot be had; the one before stays",
        "look at the security daemon",
    ),
    code(
        "EH1014",
        "the server certificate is not renewed; the one before stays",
        "look at the security daemon",
    ),
    code(
        "EH1015",
        "the server certificate has expired and is not renewed",
        "look at the security daemon; send SIGHUP to try at once",
    ),
    code("EH1016", "a changed trust bundle cannot be used", "correct the file and send SIGHUP again"),
    code(
        "EH1017",
        "twins are stored plain: EncryptTwinStore is on, and there is no workload API",
        "use an encrypted file system, or run the hub with the security daemon",
    ),
    code("EH1101", "the pages cannot accept a connection", "look at open files and memory of the machine"),
    code(
        "EH1201",
        "the oldest message of a queue cannot be read",
        "stop the hub and run `edgehub store verify`",
    ),
    code("EH1202", "another user tried the operator's socket", "run the command as the hub's user or root"),
    code(
        "EH1203",
        "the kernel does not say who connects to the operator's socket",
        "look at the kernel's log",
    ),
    code("EH1204", "the operator's socket cannot be removed", "remove the file"),
    code(
        "EH1205",
        "the operator's socket cannot accept a connection",
        "look at open files and memory of the machine",
    ),
    code("EH1301", "a thread of the program failed", "report it as a defect"),
    code(
        "EH1302",
        "connections did not end in time at the stop and were cut off",
        "raise protocolTimeoutInSecs, if clients lose work",
    ),
    code("EH1303", "a connection failed by a fault of the program", "report it as a defect"),
    code("EH1304", "a port cannot be served", "look at open files and memory of the machine"),
    code(
        "EH1305",
        "connections are closed at once: the limit of clients or of the system is reached",
        "raise what the text names",
    ),
    code(
        "EH2001",
        "the last will of a client was not stored in time",
        "look at the load of the machine and at the disk",
    ),
    code(
        "EH2002",
        "a message of a client has a topic or properties that nothing can be done with; it was acknowledged and dropped",
        "correct the client",
    ),
    code("EH2003", "the last will of a client cannot be a message", "correct the client"),
    code(
        "EH2004",
        "the connection of a client was closed for the reason in the text",
        "correct the client, or what the text names",
    ),
    code(
        "EH2005",
        "a connection was closed before its client had logged in",
        "find out who connects; port scanners do this too",
    ),
    code(
        "EH2006",
        "the stored session of a client cannot be read; it starts without subscriptions",
        "let the client subscribe again",
    ),
    code("EH2007", "a client was refused", "correct its credentials, or what the text names"),
    code(
        "EH2008",
        "the store does not give the session of a client",
        "run `edgehub store verify` on the stopped hub",
    ),
    code("EH2009", "two clients use the same identity", "give each client its own identity"),
    code("EH2010", "an AMQP connection was refused", "correct what the text names"),
    code("EH2011", "the newer token of a client was not checked", "look at the HTTPS port of the upstream"),
    code(
        "EH2012",
        "a client takes no message of the size that waits for it; it is in the dead letters",
        "raise the size that the client announces",
    ),
    code("EH2013", "something for a client was dropped", "look at the size that the client announces"),
    code(
        "EH2014",
        "an answer came for a request that the connection does not know",
        "nothing: its client is gone",
    ),
    code(
        "EH3001",
        "the identities in scope were not refreshed; the known ones stay",
        "look at the HTTPS port of the upstream: `edgehub check`",
    ),
    code(
        "EH3002",
        "more modules of leaf devices are unknown than can be asked for",
        "register the modules on edge devices",
    ),
    code("EH3003", "a module of a leaf device was not refreshed", "look at the HTTPS port of the upstream"),
    code("EH3004", "an identity was not refreshed", "look at the HTTPS port of the upstream"),
    code(
        "EH3005",
        "the identities below another edge device were not refreshed",
        "look at the HTTPS port of the upstream",
    ),
    code("EH3006", "the upstream told of identities with impossible ids", "correct the registry"),
    code(
        "EH3007",
        "certificates of the trust bundle cannot be used for those of clients",
        "correct the bundle",
    ),
    code(
        "EH3008",
        "the stored identities cannot be used; the upstream is asked",
        "connect the upstream; clients are refused until then",
    ),
    code(
        "EH3009",
        "the stored identities cannot be read; the upstream is asked",
        "connect the upstream; clients are refused until then",
    ),
    code("EH3010", "the identities are not stored and would be missing after a restart", "look at the disk"),
    code(
        "EH3011",
        "a child hub asked for identities and was refused for the reason in the text",
        "correct the child's key or clock, or its place in the registry",
    ),
    code(
        "EH3012",
        "an identity that a child hub asked for was not refreshed; the child gets what is known",
        "look at the HTTPS port of the upstream",
    ),
    code(
        "EH3013",
        "a broker as upstream cannot judge tokens of clients; the scope decides alone",
        "set AuthenticationMode to Scope",
    ),
    code("EH4001", "a route has a lint", "`edgehub route check` shows the place"),
    code("EH4002", "more routes have lints than are logged", "`edgehub route check` lists them"),
    code("EH4003", "a route leads to a module that cannot exist", "correct the route"),
    code("EH4004", "an entry of the routes is no route; the others run", "correct the entry"),
    code("EH4005", "a route does not compile; the others run", "`edgehub route check` shows the place"),
    code(
        "EH4006",
        "messages were not stored and not acknowledged",
        "look at the disk and at the limit of the store",
    ),
    code("EH4007", "the queue of a module input cannot be read; it is tried again", "look at the disk"),
    code("EH4008", "a module refused a message, which is in the dead letters", "`edgehub dlq list` shows it"),
    code(
        "EH4009",
        "messages of a module came back or were not answered in time; they are offered again",
        "look at the module",
    ),
    code(
        "EH4010",
        "a stored message cannot be read and was dropped; the ledger counts it",
        "run `edgehub store verify` on the stopped hub",
    ),
    code("EH4011", "a task of the hub failed", "report it as a defect"),
    code(
        "EH4012",
        "a stored twin cannot be read; it is read from the upstream again",
        "run `edgehub store verify` on the stopped hub; an encrypted one needs the key that the daemon had",
    ),
    code(
        "EH4013",
        "a cloud-to-device message has no lock token and is not delivered",
        "correct the upstream",
    ),
    code("EH4014", "reported properties that wait for the upstream cannot be read", "look at the disk"),
    code("EH4015", "a twin cannot be read while its links are made", "look at the disk"),
    code("EH4016", "a twin cannot be read for its client", "look at the disk"),
    code("EH4018", "a twin cannot be read beside that of the upstream", "look at the disk"),
    code(
        "EH4019",
        "a change of desired properties cannot be read; the whole twin is read",
        "nothing, unless it comes again",
    ),
    code("EH4020", "a twin cannot be read for a change of desired properties", "look at the disk"),
    code("EH4021", "reported properties are not stored and not acknowledged", "look at the disk"),
    code("EH4022", "a twin cannot be read to report it", "look at the disk"),
    code("EH4023", "a twin cannot be read after it was reported", "look at the disk"),
    code("EH4025", "a twin is kept in memory only for now", "look at the disk"),
    code("EH4026", "an answer for a client was dropped because it does not read", "look at the client"),
    code("EH4027", "the stored configuration cannot be read; the upstream is asked", "connect the upstream"),
    code("EH4028", "the stored configuration cannot be used; the upstream is asked", "connect the upstream"),
    code("EH4029", "the configuration would be missing after a restart without upstream", "look at the disk"),
    code("EH4030", "a configuration was refused; the one before stays", "correct the deployment"),
    code("EH4031", "the twin of the hub was not read; the configuration stays", "connect the upstream"),
    code("EH4032", "the configuration has a section mqttBroker", "remove it"),
    code("EH4033", "the upstream refused what the hub reports of itself", "look at the reason"),
    code("EH4034", "twin or session of an identity that left the scope is not deleted", "look at the disk"),
    code("EH4035", "what is stored of identities that left the scope cannot be read", "look at the disk"),
    code(
        "EH4036",
        "a target is set for a route that is not in force or does not lead to $upstream",
        "correct the name in upstream.targets",
    ),
    code(
        "EH5001",
        "the upstream is not connected; messages are stored",
        "`edgehub check` tells what is wrong",
    ),
    code("EH5002", "the queues of the upstream cannot be read; they are tried again", "look at the disk"),
    code(
        "EH5003",
        "the upstream refused a batch; its messages go one by one",
        "nothing, unless a dead letter follows",
    ),
    code(
        "EH5004",
        "messages of one sender do not go up; they are offered again",
        "look at the reason, often the registry",
    ),
    code(
        "EH5005",
        "the upstream refused a message, which is in the dead letters",
        "`edgehub dlq list` shows it",
    ),
    code("EH5006", "a root certificate of the system cannot be read", "correct the system's certificates"),
    code("EH5007", "the answer of a method is larger than the upstream takes", "make the answer smaller"),
    code(
        "EH5008",
        "the watchdog found that nothing moves and started a link, session or connection anew",
        "look at the upstream if it comes again",
    ),
    code("EH5009", "the upstream sent what is no twin, method or message", "report it, if it comes again"),
    code("EH5010", "what the upstream asked for could not be done", "read the text"),
    code(
        "EH5011",
        "the upstream refuses a link that a client wants; it is asked again",
        "look at the reason, often the registry",
    ),
    code(
        "EH5012",
        "the upstream ended the session of an identity; it is made anew",
        "look at the reason, often the registry",
    ),
    code(
        "EH5013",
        "messages and the password of a broker go up in clear text",
        "use amqps:// in upstream.url",
    ),
    code(
        "EH6001",
        "a part of the store is damaged and was set aside",
        "`edgehub store stat` and `verify` on the stopped hub; keep the folder that was set aside",
    ),
    code(
        "EH6002",
        "the next start will not look for damage by itself",
        "run `edgehub store verify` on the stopped hub",
    ),
    code("EH6003", "the database of another program is left alone", "let the old hub empty its queues"),
    code("EH6004", "the report beside a damaged part was not written", "look at the disk"),
    code("EH6005", "the store was not flushed to make room", "look at the disk"),
    code("EH6006", "the files of the store were not fitted to its limit", "look at the disk"),
    code("EH6007", "files of settled messages were not removed; it is tried again", "look at the disk"),
    code("EH6008", "the room of the store was not measured", "look at the disk"),
    code("EH6009", "the disk is almost full; the store goes on from its reserve", "free space"),
    code("EH6010", "the reserve of the store was not given back to the file system", "free space"),
    code("EH6011", "the store has no reserve for a full disk", "free space"),
    code("EH6012", "a stored entry cannot be read", "run `edgehub store verify` on the stopped hub"),
    code(
        "EH6013",
        "entries cannot be read and were dropped; the ledger counts them",
        "run `edgehub store verify` on the stopped hub",
    ),
    code(
        "EH6014",
        "new messages find no room",
        "free space, raise storeLimits.maxSizeBytes, or look why nothing drains",
    ),
    code("EH6015", "a thread of the store failed", "report it as a defect"),
    code("EH6016", "the last writes before the stop were not synced", "look at the disk"),
    code("EH6017", "a write to the store failed; its messages were not acknowledged", "look at the disk"),
    code("EH6018", "the room of the store was not measured after a write", "look at the disk"),
    code("EH6019", "the reserve of the store was not given back to the file system", "free space"),
    code("EH6020", "a sync of the store failed; its messages were not acknowledged", "look at the disk"),
    code(
        "EH7001",
        "the registry is not read again before a login",
        "look at the data folder of the stand-in",
    ),
    code("EH7002", "the stand-in dropped a message that is none", "correct the sender"),
    code("EH7003", "the stand-in cannot accept a connection", "look at open files and memory of the machine"),
    code("EH7004", "the telemetry log cannot be read", "look at the data folder of the stand-in"),
    code(
        "EH7005",
        "the registry is not read again before a scope call",
        "look at the data folder of the stand-in",
    ),
    code(
        "EH7006",
        "the telemetry log ended within a line, which was taken off",
        "nothing: its message was not acknowledged",
    ),
    code("EH7007", "telemetry was not written", "look at the disk"),
    code("EH7008", "feedback that nobody takes was dropped", "take it, or ask for none"),
    code("EH7009", "a twin request failed in the stand-in", "look at the disk"),
    code("EH7010", "a twin cannot be read in the stand-in", "look at the disk"),
    code("EH7011", "the twin of a removed identity stays on disk", "remove its file"),
    code(
        "EH7012",
        "the registry is not read again before a service is judged",
        "look at the data folder of the stand-in",
    ),
    code("EH7013", "a service call failed", "read the text"),
    code(
        "EH7014",
        "the registry is not read again before a service call",
        "look at the data folder of the stand-in",
    ),
    code(
        "EH7015",
        "the stand-in for the security daemon cannot accept a connection",
        "look at open files and memory of the machine",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_in_order_and_of_one_form() {
        assert!(CODES.windows(2).all(|pair| pair[0].code < pair[1].code));
        for known in CODES {
            let digits = known.code.strip_prefix("EH").unwrap_or_default();
            assert!(digits.len() == 4 && digits.bytes().all(|byte| byte.is_ascii_digit()), "{}", known.code);
            assert!(!known.meaning.ends_with('.') && !known.next.is_empty());
            assert_eq!(find(known.code), Some(known));
        }
        assert_eq!(find("EH9999"), None);
    }
}
