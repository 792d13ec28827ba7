//! User names of SASL PLAIN.

use percent_encoding::percent_decode_str;

use crate::identity::Identity;

/// Marks that an id may hold besides letters and digits, before it is decoded.
const MARKS: &str = "-:.+%_#*?!(),=;$'";

/// The identity of a user name: `{device}[/modules/{module}]@[sas.]{hub}`, where `{hub}` is the first label of the IoT
/// hub's host name. Case is ignored in what is no id; ids are URL-decoded.
pub(super) fn identity(user: &str, iot_hub_host: &str) -> Option<Identity> {
    let (path, hub) = user.rsplit_once('@')?;
    let label = iot_hub_host.split('.').next().unwrap_or_default();
    let short = hub.get(..4).filter(|prefix| prefix.eq_ignore_ascii_case("sas.")).map_or(hub, |_| &hub[4..]);
    if label.is_empty() || !(hub.eq_ignore_ascii_case(label) || short.eq_ignore_ascii_case(label)) {
        return None;
    }
    let mut parts = path.split('/');
    let device = decoded(parts.next()?)?;
    match (parts.next(), parts.next(), parts.next()) {
        (None, ..) => Identity::device(&device).ok(),
        (Some(modules), Some(module), None) if modules.eq_ignore_ascii_case("modules") => {
            Identity::module(&device, &decoded(module)?).ok()
        }
        _ => None,
    }
}

fn decoded(id: &str) -> Option<String> {
    let legal = |character: char| character.is_ascii_alphanumeric() || MARKS.contains(character);
    if id.is_empty() || !id.chars().all(legal) {
        return None;
    }
    let spaced = id.replace('+', " ");
    Some(percent_decode_str(&spaced).decode_utf8().ok()?.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_as_a_whole() {
        let parse = |user: &str| identity(user, "hub1.example.net").map(|identity| identity.to_string());
        for (user, expected) in [
            ("d1@sas.hub1", "d1"),
            ("d1@HUB1", "d1"),
            ("d1/MODULES/m%2B1@SAS.hub1", "d1/m+1"),
            ("a+b@hub1", "a b"),
        ] {
            assert_eq!(parse(user).as_deref(), Some(expected), "{user}");
        }
        for user in [
            "d1",
            "@hub1",
            "d1@",
            "d1@hub2",
            "d1@hub1.example.net",
            "d1@sas.root.hub1",
            "d1/modules/@hub1",
            "d1/modules/m/x@hub1",
            "d1/m1@hub1",
            "/modules/m@hub1",
            "d 1@hub1",
            "%ff@hub1",
            "%2f@hub1",
            "d@x@hub1",
        ] {
            assert_eq!(parse(user), None, "{user}");
        }
        assert_eq!(identity("d1@hub", "hub"), Identity::device("d1").ok());
        assert_eq!(identity("d1@", ""), None);
    }
}
