//! Topic filters (MQTT 3.1.1 §4.7): which are well formed, and which topics they match.

/// Whether a filter is well formed: not empty, `#` alone in the last level, `+` alone in its level.
pub fn is_valid(filter: &str) -> bool {
    if filter.is_empty() {
        return false;
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let fine = match level {
            "#" => levels.peek().is_none(),
            "+" => true,
            text => memchr::memchr2(b'#', b'+', text.as_bytes()).is_none(),
        };
        if !fine {
            return false;
        }
    }
    true
}

/// Whether a well-formed filter matches a topic. Unlike MQTT 3.1.1 §4.7.2, topics that begin with `$` are matched
/// like any other: here every one of them is a topic of the hub's own protocol.
pub fn matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for wanted in filter.split('/') {
        if wanted == "#" {
            return true;
        }
        match levels.next() {
            Some(level) if wanted == "+" || wanted == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked() {
        for filter in ["#", "+", "a/#", "a/+/b", "+/+", "/", "a//b", "$iothub/twin/res/#"] {
            assert!(is_valid(filter), "{filter}");
        }
        for filter in ["", "a#", "a/#/b", "+a", "a+/b", "##", "a/b#"] {
            assert!(!is_valid(filter), "{filter}");
        }
    }

    #[test]
    fn topics_are_matched() {
        for (filter, topic, expected) in [
            ("#", "a/b", true),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("a/#", "ab", false),
            ("a/+", "a/b", true),
            ("a/+", "a", false),
            ("a/+", "a/b/c", false),
            ("a/+/c", "a//c", true),
            ("é/b", "é/b", true),
            ("$iothub/methods/POST/#", "$iothub/methods/POST/x/?$rid=1", true),
            ("+/b", "/b", true),
            ("a", "a/", false),
        ] {
            assert_eq!(matches(filter, topic), expected, "{filter} {topic}");
        }
    }
}
