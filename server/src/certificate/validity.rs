//! Owns what an operator is told of the validity of the server certificate.

use edgehub_broker::identity::CertificateFacts;
use time::OffsetDateTime;

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
        let CertificateFacts { not_before, not_after, .. } = CertificateFacts::of(certificate)?;
        Some(Self { not_before, not_after })
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

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

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
