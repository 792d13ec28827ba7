//! Owns the reading of the validity out of a certificate.

use time::{Date, Month, OffsetDateTime, Time};

const SEQUENCE: u8 = 0x30;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const VERSION: u8 = 0xa0;

/// The time in which a certificate is valid (RFC 5280 §4.1.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub not_before: OffsetDateTime,
    /// Last moment.
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// Reads the validity of a certificate in DER form; `None` if the form is not that of RFC 5280.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (_, certificate, _) = element(certificate).filter(|(tag, ..)| *tag == SEQUENCE)?;
        let (_, mut rest, _) = element(certificate).filter(|(tag, ..)| *tag == SEQUENCE)?;
        if let Some((VERSION, _, after)) = element(rest) {
            rest = after;
        }
        // serial number, signature algorithm, issuer
        for _ in 0..3 {
            rest = element(rest)?.2;
        }
        let (_, validity, _) = element(rest).filter(|(tag, ..)| *tag == SEQUENCE)?;
        let (tag, from, rest) = element(validity)?;
        let not_before = moment(tag, from)?;
        let (tag, until, _) = element(rest)?;
        Some(Self { not_before, not_after: moment(tag, until)? })
    }

    /// What an operator should know of it at this moment.
    pub fn warning(&self, now: OffsetDateTime) -> Option<String> {
        if now > self.not_after {
            return Some(format!("the server certificate expired at {}; renew it", self.not_after));
        }
        if now < self.not_before {
            return Some(format!(
                "the server certificate is valid only from {}; check the clock of this machine",
                self.not_before
            ));
        }
        None
    }
}

/// Takes one element of DER: its tag, its content and what follows.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
}

/// `YYMMDDhhmmssZ` (years 1950 to 2049) or `YYYYMMDDhhmmssZ`.
fn moment(tag: u8, text: &[u8]) -> Option<OffsetDateTime> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i32 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    if rest.len() != 10 {
        return None;
    }
    let part = |place: usize| rest[2 * place..2 * place + 2].parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    Some(date.with_time(Time::from_hms(part(2)?, part(3)?, part(4)?).ok()?).assume_utc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn both_forms_of_time() {
        assert_eq!(moment(UTC_TIME, b"491231235959Z"), Some(datetime!(2049-12-31 23:59:59 UTC)));
        assert_eq!(moment(UTC_TIME, b"500101000000Z"), Some(datetime!(1950-01-01 00:00 UTC)));
        assert_eq!(moment(GENERALIZED_TIME, b"20500101000000Z"), Some(datetime!(2050-01-01 00:00 UTC)));
        for broken in [&b"4912312359Z"[..], b"491331235959Z", b"491231235959", b"", b"Z", b"49123123595\xffZ"]
        {
            assert_eq!(moment(UTC_TIME, broken), None);
        }
    }

    #[test]
    fn a_made_certificate_and_its_broken_copies() {
        let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.not_before = datetime!(2026-01-02 03:04:05 UTC);
        params.not_after = datetime!(2060-01-02 03:04:05 UTC);
        let made = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let validity = Validity::of(made.der()).expect("readable");
        assert_eq!(validity, Validity { not_before: params.not_before, not_after: params.not_after });
        assert_eq!(validity.warning(datetime!(2030-01-01 00:00 UTC)), None);
        assert!(validity.warning(datetime!(2061-01-01 00:00 UTC)).unwrap().contains("expired"));
        assert!(validity.warning(datetime!(2025-01-01 00:00 UTC)).unwrap().contains("clock"));
        for end in 0..100 {
            let _any_answer_without_panic = Validity::of(&made.der()[..end]);
        }
    }
}
