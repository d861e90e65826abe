//! Who a client is by its certificate: for the access log, and for the field in which EPPs and endpoints get it.
//!
//! The certificate was verified. What it says is nevertheless the choice of whoever had it signed, so that everything here is bounded and
//! quoted.

use std::fmt::Write as _;

use http::HeaderValue;
use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

use crate::text::{self, cut};

/// A field with more bytes has the hash alone.
const LONGEST: usize = 4096;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
/// The types of strings whose bytes are ASCII or UTF-8: UTF8String, PrintableString, TeletexString, IA5String.
const STRINGS: [u8; 4] = [0x0c, 0x13, 0x14, 0x16];
/// Short names of attributes (RFC 4514, section 3), by their object identifier.
const SHORT: [(&[u8], &str); 9] = [
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 9], "STREET"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25], "DC"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1], "UID"),
];

/// The identity of a client that has presented a certificate.
#[derive(Debug)]
pub struct ClientIdentity {
    /// For the access log: the first URI or name that the certificate is for, or else its subject.
    pub name: String,
    /// In the form of Envoy's `X-Forwarded-Client-Cert`.
    pub field: HeaderValue,
}

impl ClientIdentity {
    /// Reads a certificate. `None` if it cannot be read, which verification has ruled out.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = EndEntityCert::try_from(certificate).ok()?;
        let subject = subject(parsed.subject());
        let (uris, names): (Vec<_>, Vec<_>) = (parsed.valid_uri_names().collect(), parsed.valid_dns_names().collect());
        let name = uris.first().or(names.first()).map_or(subject.as_str(), |name| name);
        let mut hash = String::from("Hash=");
        for byte in digest(&SHA256, certificate).as_ref() {
            let _ = write!(hash, "{byte:02x}");
        }
        let mut field = format!("{hash};Subject={}", quoted(&subject));
        for (key, value) in uris.iter().map(|uri| ("URI", uri)).chain(names.iter().map(|name| ("DNS", name))) {
            let is_plain = value.bytes().all(|byte| byte.is_ascii_graphic() && !b",;=\"\\".contains(&byte));
            let value = if is_plain { (*value).to_owned() } else { quoted(value) };
            let _ = write!(field, ";{key}={value}");
        }
        let field = if field.len() <= LONGEST { field } else { hash };
        Some(Self { name: cut(name, text::PHRASE).into_owned(), field: HeaderValue::from_str(&field).ok()? })
    }
}

/// In quotes, in printable ASCII.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => out.extend(['\\', char::from(byte)]),
            b' '..=b'~' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "\\{byte:02X}");
            }
        }
    }
    out.push('"');
    out
}

/// A subject (the content of a DER Name) in the form of RFC 4514: the last part first. What cannot be read is left out.
fn subject(mut der: &[u8]) -> String {
    let mut parts = Vec::new();
    while let Some((SET, mut set, rest)) = element(der) {
        der = rest;
        let mut both = Vec::new();
        while let Some((SEQUENCE, pair, rest)) = element(set) {
            set = rest;
            both.extend(attribute(pair));
        }
        parts.push(both.join("+"));
    }
    parts.reverse();
    parts.join(",")
}

fn attribute(pair: &[u8]) -> Option<String> {
    let (OID, oid, rest) = element(pair)? else { return None };
    let (kind, value, _) = element(rest)?;
    let name = SHORT.iter().find(|(known, _)| *known == oid).map(|(_, name)| (*name).to_owned());
    let text = std::str::from_utf8(value).ok().filter(|_| STRINGS.contains(&kind));
    Some(match (name, text) {
        (Some(name), Some(text)) => format!("{name}={}", escaped(text)),
        // RFC 4514, section 2.4: the encoding in hexadecimal.
        (name, _) => {
            let encoded = &rest[..rest.len() - element(rest)?.2.len()];
            let hex: String = encoded.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{}=#{hex}", name.unwrap_or_else(|| dotted(oid)))
        }
    })
}

/// RFC 4514, section 2.4.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, letter) in text.char_indices() {
        let is_end = at == 0 || at + letter.len_utf8() == text.len();
        match letter {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => out.extend(['\\', letter]),
            '#' if at == 0 => out.push_str("\\#"),
            ' ' if is_end => out.push_str("\\ "),
            letter if letter.is_control() => {
                for byte in letter.encode_utf8(&mut [0; 4]).bytes() {
                    let _ = write!(out, "\\{byte:02X}");
                }
            }
            letter => out.push(letter),
        }
    }
    out
}

/// An object identifier in numbers.
fn dotted(oid: &[u8]) -> String {
    let mut numbers: Vec<u64> = Vec::new();
    let mut number = 0_u64;
    for &byte in oid {
        number = number.wrapping_shl(7) | u64::from(byte & 0x7f);
        if byte < 0x80 {
            if numbers.is_empty() {
                let first = (number / 40).min(2);
                numbers.extend([first, number - 40 * first]);
            } else {
                numbers.push(number);
            }
            number = 0;
        }
    }
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(".")
}

/// The first element of a DER text: its tag, its content, and what follows.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => (usize::from(u16::from_be_bytes(*rest.first_chunk()?)), &rest[2..]),
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn identity(subject: &[(DnType, &str)], names: Vec<SanType>) -> ClientIdentity {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, text) in subject {
            params.distinguished_name.push(kind.clone(), *text);
        }
        params.subject_alt_names = names;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        ClientIdentity::of(certificate.der()).unwrap()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn dns(text: &str) -> SanType {
        SanType::DnsName(text.try_into().unwrap())
    }

    /// The field without the hash.
    fn field(identity: &ClientIdentity) -> &str {
        let text = identity.field.to_str().unwrap();
        let (hash, rest) = text.split_at("Hash=".len() + 64);
        assert!(hash.bytes().skip(5).all(|byte| byte.is_ascii_hexdigit()), "{text}");
        rest
    }

    #[test]
    fn names_and_subject_are_read() {
        let subject = [(DnType::OrganizationName, "Models, Inc."), (DnType::CommonName, "agent 7")];
        let both = identity(&subject, vec![dns("a.example"), uri("spiffe://cluster/ns/a"), dns("b.example")]);
        assert_eq!(both.name, "spiffe://cluster/ns/a");
        let expected =
            r#";Subject="CN=agent 7,O=Models\\, Inc.";URI=spiffe://cluster/ns/a;DNS=a.example;DNS=b.example"#;
        assert_eq!(field(&both), expected);
        let alone = identity(&subject, vec![]);
        assert_eq!(
            (alone.name.as_str(), field(&alone)),
            (r"CN=agent 7,O=Models\, Inc.", r#";Subject="CN=agent 7,O=Models\\, Inc.""#)
        );
        let nobody = identity(&[], vec![dns("a.example")]);
        assert_eq!((nobody.name.as_str(), field(&nobody)), ("a.example", r#";Subject="";DNS=a.example"#));
    }

    /// Nothing in a certificate can end its part of the field or the line.
    #[test]
    fn hostile_names_are_quoted_and_bounded() {
        let text = "x\";URI=spiffe://admin;\r\nx: y\u{e9}\u{0}";
        let hostile = identity(&[(DnType::CommonName, text)], vec![uri("spiffe://a,By=b;\"c\\d")]);
        let expected = [
            r#";Subject="CN=x\\\"\\;URI=spiffe://admin\\;\\0D\\0Ax: y\C3\A9\\00""#,
            r#";URI="spiffe://a,By=b;\"c\\d""#,
        ];
        assert_eq!(field(&hostile), expected.concat());
        let long = "x".repeat(5000);
        let long = identity(&[(DnType::CommonName, &long)], vec![]);
        assert_eq!(field(&long), "");
        assert!(long.name.len() < 2 * text::PHRASE, "{}", long.name.len());
    }

    #[test]
    fn unknown_attributes_are_shown_by_number() {
        let custom = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 311, 20]);
        assert_eq!(identity(&[(custom, "v")], vec![]).name, "1.3.6.1.4.1.311.20=#0c0176");
    }

    #[test]
    fn damaged_subjects_are_read_as_far_as_they_go() {
        let whole = [SET, 11, SEQUENCE, 9, OID, 3, 0x55, 4, 3, 0x0c, 2, b'h', b'i'];
        assert_eq!(subject(&whole), "CN=hi");
        for length in 0..whole.len() {
            assert_eq!(subject(&whole[..length]), "", "{length}");
        }
        for at in 0..whole.len() {
            for byte in [0, 0x7f, 0x80, 0x81, 0x82, 0xff] {
                let mut changed = whole;
                changed[at] = byte;
                let _ = subject(&changed);
            }
        }
    }
}
