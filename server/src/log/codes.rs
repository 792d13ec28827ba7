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
