//! Tries the certificate of `[listen.tls]`: until when it is valid, and whether it is for the hosts that routes name. That files are
//! readable and that the key fits is checked with the configuration.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::{
    CertificateError, Error, RootCertStore,
    client::{verify_server_cert_signed_by_trust_anchor, verify_server_name},
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};

use super::Trial;
use crate::{
    config::{Config, HostPattern, ListenTls},
    tls::Certificate,
};

/// A certificate that ends within this time counts as failed: its renewal is late.
const SOON: Duration = Duration::from_secs(7 * 24 * 3600);
/// After the end of every certificate, in seconds since 1970.
const NEVER: u64 = 1 << 40;
/// A name that no certificate has (RFC 6761).
const NO_NAME: &str = "penstock.invalid";
const RENEW: &str = "renew the certificate at `listen.tls.cert_file`; the agent reloads it";

/// Tries the certificate as it is now. `None` without `[listen.tls]`.
pub(super) fn try_certificate(config: &Config, now: SystemTime) -> Option<Trial> {
    let tls = config.listen.tls.as_ref()?;
    let name = format!("listen.tls {}", tls.address);
    Some(match Certificate::read(tls) {
        Ok(certificate) => judge(name, config, tls, &certificate.chain(), now),
        Err(error) => Trial::failed(name, error.to_string(), "correct `cert_file` and `key_file` in `[listen.tls]`"),
    })
}

fn judge(name: String, config: &Config, tls: &ListenTls, chain: &[CertificateDer<'static>], now: SystemTime) -> Trial {
    let file = tls.cert_file.display();
    let Some(Ok(parsed)) = chain.first().map(ParsedCertificate::try_from) else {
        return Trial::failed(name, format!("{file} has no usable certificate"), "correct `listen.tls.cert_file`");
    };
    let Validity { begin, end } = Validity::of(&parsed, &chain[1..]);
    let date = |time: Option<SystemTime>| time.map_or_else(|| "?".to_owned(), httpdate::fmt_http_date);
    if begin.is_some_and(|begin| now < begin) {
        let advice = "correct the clock of this machine, or `listen.tls.cert_file`";
        return Trial::failed(name, format!("{file} is not valid before {}", date(begin)), advice);
    }
    if end.is_some_and(|end| end <= now) {
        return Trial::failed(name, format!("{file} expired at {}", date(end)), RENEW);
    }
    if end.is_some_and(|end| end <= now + SOON) {
        return Trial::failed(name, format!("{file} expires at {}", date(end)), RENEW);
    }
    let names = names(&parsed);
    let is_for = |host: &str| ServerName::try_from(host).is_ok_and(|host| verify_server_name(&parsed, &host).is_ok());
    let hosts = config.routes.iter().flat_map(|route| &route.hosts).map(|host| match host {
        HostPattern::Exact(host) => host.clone(),
        HostPattern::Below(suffix) => format!("any{suffix}"),
    });
    let foreign: Vec<String> = hosts.filter(|host| !is_for(host)).collect();
    if names.is_empty() || !foreign.is_empty() {
        let wanted = if foreign.is_empty() { "any host".to_owned() } else { foreign.join(", ") };
        let found = format!("{file} is not for {wanted}; its names: {}", shown(&names));
        return Trial::failed(name, found, "use a certificate for the hosts of the routes at `listen.tls.cert_file`");
    }
    Trial::ok(name, format!("certificate for {}, valid until {}", shown(&names), date(end)))
}

fn shown(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

struct Validity {
    begin: Option<SystemTime>,
    end: Option<SystemTime>,
}

impl Validity {
    /// Reads the dates from the errors for a time before and one after all certificates.
    fn of(certificate: &ParsedCertificate<'_>, intermediates: &[CertificateDer<'_>]) -> Self {
        let (begin, end) = (error_at(certificate, intermediates, 0), error_at(certificate, intermediates, NEVER));
        let time = |time: UnixTime| UNIX_EPOCH + Duration::from_secs(time.as_secs());
        Self {
            begin: match begin {
                Some(CertificateError::NotValidYetContext { not_before, .. }) => Some(time(not_before)),
                _ => None,
            },
            end: match end {
                Some(CertificateError::ExpiredContext { not_after, .. }) => Some(time(not_after)),
                _ => None,
            },
        }
    }
}

/// Why the certificate is not valid at this time, in seconds since 1970. Its dates are checked before its issuer.
fn error_at(
    certificate: &ParsedCertificate<'_>,
    intermediates: &[CertificateDer<'_>],
    seconds: u64,
) -> Option<CertificateError> {
    let (nobody, now) = (RootCertStore::empty(), UnixTime::since_unix_epoch(Duration::from_secs(seconds)));
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    match verify_server_cert_signed_by_trust_anchor(certificate, &nobody, intermediates, now, algorithms) {
        Err(Error::InvalidCertificate(error)) => Some(error),
        _ => None,
    }
}

/// The names in the certificate.
fn names(certificate: &ParsedCertificate<'_>) -> Vec<String> {
    let Ok(nobody) = ServerName::try_from(NO_NAME) else { return Vec::new() };
    match verify_server_name(certificate, &nobody) {
        Err(Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. })) => {
            // Each is a variant's name with the name in parentheses.
            let bare = |name: &String| {
                name.split_once('(')
                    .map_or(name.as_str(), |(_, bare)| bare)
                    .trim_end_matches(')')
                    .trim_matches('"')
                    .to_owned()
            };
            presented.iter().map(bare).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    /// 2030-01-01.
    const BEGIN: u64 = 1_893_456_000;
    const DAY: u64 = 24 * 3600;

    /// The certificate's names, the routes' hosts, the day, whether it is fine, what is found, and what the advice names.
    type Row<'a> = (&'a [&'a str], &'a [HostPattern], u64, bool, &'a str, &'a str);

    /// Judges a certificate for these names, valid from 2030-01-01 to 2030-01-31, on this day of that year, if routes have these
    /// hosts.
    fn judged(names: &[&str], hosts: &[HostPattern], day: u64) -> Trial {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2030, 1, 1), date_time_ymd(2030, 1, 31));
        let key = KeyPair::generate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (cert_file, key_file) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        std::fs::write(&cert_file, params.self_signed(&key).unwrap().pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        let mut config = Config::new(vec![crate::config::Pool::new("a", vec![])]);
        config.listen.tls = Some(ListenTls { cert_file, key_file, ..ListenTls::default() });
        for host in hosts {
            config.routes.push(crate::config::Route { hosts: vec![host.clone()], ..Default::default() });
        }
        let now = UNIX_EPOCH + Duration::from_secs(BEGIN - DAY) + Duration::from_secs(day * DAY);
        try_certificate(&config, now).unwrap()
    }

    #[test]
    fn certificate_is_judged_by_dates_and_names() {
        let exact = |host: &str| HostPattern::Exact(host.to_owned());
        let below = |suffix: &str| HostPattern::Below(suffix.to_owned());
        let rows: [Row<'_>; 10] = [
            (&["a.example"], &[], 5, true, "for a.example, valid until Thu, 31 Jan 2030", ""),
            (&["a.example"], &[exact("a.example")], 5, true, "for a.example", ""),
            (
                &["*.a.example", "127.0.0.1"],
                &[below(".a.example"), exact("b.a.example")],
                5,
                true,
                "*.a.example, 127.0.0.1",
                "",
            ),
            (&["a.example"], &[], 0, false, "is not valid before Tue, 01 Jan 2030", "clock"),
            (&["a.example"], &[], 23, true, "valid until", ""),
            (&["a.example"], &[], 25, false, "expires at Thu, 31 Jan 2030", "renew"),
            (&["a.example"], &[], 40, false, "expired at Thu, 31 Jan 2030", "renew"),
            (
                &["a.example"],
                &[exact("a.example"), exact("b.example")],
                5,
                false,
                "not for b.example; its names: a.example",
                "hosts",
            ),
            (&["a.example"], &[below(".example")], 5, false, "not for any.example", "hosts"),
            (&[], &[], 5, false, "not for any host; its names: none", "hosts"),
        ];
        for (names, hosts, day, ok, found, advice) in rows {
            let trial = judged(names, hosts, day);
            assert_eq!((trial.ok, trial.advice.is_none()), (ok, ok), "{trial:?}");
            assert!(trial.found.contains(found), "{found}: {trial:?}");
            assert!(trial.advice.as_deref().unwrap_or_default().contains(advice), "{advice}: {trial:?}");
        }
    }

    #[test]
    fn unusable_files_are_named() {
        let mut config = Config::new(vec![]);
        assert!(try_certificate(&config, SystemTime::now()).is_none());
        config.listen.tls = Some(ListenTls { cert_file: "/nowhere/tls.crt".into(), ..ListenTls::default() });
        let trial = try_certificate(&config, SystemTime::now()).unwrap();
        assert!(!trial.ok && trial.found.contains("/nowhere/tls.crt") && trial.advice.unwrap().contains("`cert_file`"));
    }
}
