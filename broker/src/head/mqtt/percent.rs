//! Percent-encoding as the SDKs read and write it (RFC 3986 §2.1, UTF-8).

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// Appends `text` decoded. Sequences that are malformed, or that are not UTF-8 when decoded, stay as they are; `+`
/// stays `+`. What is appended is never longer than `text`.
pub(super) fn decode_into(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(offset) = memchr::memchr(b'%', &bytes[at..]) {
        let run_start = at + offset;
        out.extend_from_slice(&bytes[at..run_start]);
        // A run of escapes is decoded in place first, then checked, because a character may take several of them.
        let decoded_start = out.len();
        at = run_start;
        while let Some(byte) = escape(&bytes[at..]) {
            out.push(byte);
            at += 3;
        }
        if at == run_start {
            out.push(b'%');
            at += 1;
        } else if std::str::from_utf8(&out[decoded_start..]).is_err() {
            let decoded = out.split_off(decoded_start);
            let mut source = run_start;
            for chunk in decoded.utf8_chunks() {
                out.extend_from_slice(chunk.valid().as_bytes());
                source += 3 * chunk.valid().len();
                let kept = 3 * chunk.invalid().len();
                out.extend_from_slice(&bytes[source..source + kept]);
                source += kept;
            }
        }
    }
    out.extend_from_slice(&bytes[at..]);
}

/// Decodes a text of its own.
pub(super) fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    decode_into(text, &mut out);
    // Only UTF-8 is ever appended.
    String::from_utf8(out).unwrap_or_default()
}

/// Appends `text` with every byte escaped that is not unreserved.
pub(super) fn encode_into(text: &str, out: &mut Vec<u8>) {
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(byte);
        } else {
            out.extend_from_slice(&[b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
}

fn escape(bytes: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = bytes else { return None };
    let digit = |byte: u8| (byte as char).to_digit(16);
    Some((digit(*high)? << 4 | digit(*low)?) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn broken_sequences_stay() {
        for (text, expected) in [
            ("a%20b", "a b"),
            ("100%25%zz", "100%%zz"),
            ("%", "%"),
            ("%2", "%2"),
            ("%C3%BC", "ü"),
            ("%c3%bc+", "ü+"),
            ("%C3", "%C3"),
            ("a%FF%20%E2%82%ACb", "a%FF €b"),
            ("%E2%82x", "%E2%82x"),
        ] {
            assert_eq!(decode(text), expected);
        }
    }

    proptest! {
        #[test]
        fn encoded_text_comes_back(text in ".*") {
            let mut encoded = Vec::new();
            encode_into(&text, &mut encoded);
            prop_assert_eq!(decode(std::str::from_utf8(&encoded).unwrap()), text);
        }

        #[test]
        fn any_text_decodes_to_text_that_is_no_longer(text in "(%[0-9a-fA-F]{2}|%|.){0,40}") {
            let mut decoded = Vec::new();
            decode_into(&text, &mut decoded);
            prop_assert!(decoded.len() <= text.len());
            prop_assert!(std::str::from_utf8(&decoded).is_ok());
        }
    }
}
