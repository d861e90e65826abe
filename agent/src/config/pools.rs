//! `[[pools]]`: the endpoints of each pool, its picker, and where requests go when the picker fails.

use std::net::SocketAddr;

use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};

use super::{
    AppProtocol, Epp, EppTls, FailureMode, Node, Picker, Pool, ResponseToPicker, document::Section, endpoints, health,
    retry, subset, value,
};

pub(super) fn pools(root: &mut Section<'_>, listen: SocketAddr, node: &Node) -> Vec<Pool> {
    let mut names: Vec<String> = Vec::new();
    let pools = root.sections("pools", |section| {
        let pool = pool(section, listen, node);
        if names.contains(&pool.name) {
            section.reject("name", format_args!("{:?} again", pool.name), "a name that no other pool has");
        }
        names.push(pool.name.clone());
        pool
    });
    if pools.is_empty() {
        root.reject("pools", "none", "at least one [[pools]] section");
    }
    pools
}

fn pool(section: &mut Section<'_>, listen: SocketAddr, node: &Node) -> Pool {
    const MODES: &[(&str, FailureMode)] = &[("open", FailureMode::Open), ("closed", FailureMode::Closed)];
    const PROTOCOLS: &[(&str, AppProtocol)] = &[("http1", AppProtocol::Http1), ("h2c", AppProtocol::H2c)];
    let ports = endpoints::ports(section);
    let (picker, session_headers) = section.section("picker", |section| (picker(section), session_headers(section)));
    let pool = Pool {
        name: section.require("name", "the name of the pool", value::pool_name).unwrap_or_default(),
        endpoints: endpoints::listed(section, &ports, listen),
        endpoints_dns: endpoints::named(section, &ports),
        endpoints_file: endpoints::file(section),
        ports,
        app_protocol: section.read("app_protocol", value::one_of(PROTOCOLS)).unwrap_or_default(),
        failure_mode: section.read("failure_mode", value::one_of(MODES)).unwrap_or(FailureMode::Closed),
        default_upstream: section.read("default_upstream", value::endpoint),
        passthrough: section.read("passthrough", value::boolean).unwrap_or(false),
        picker,
        session_headers,
        subset: section.section("subset", |section| subset::subset(section, node)),
        retry: section.section("retry", retry::retry),
        ejection: section.section("ejection", health::ejection),
        health: health::check(section),
    };
    check_endpoints(section, &pool);
    check_failure_mode(section, &pool);
    pool
}

fn check_endpoints(section: &Section<'_>, pool: &Pool) {
    let named_by_epp = matches!(pool.picker, Picker::Epp(_)) && pool.passthrough;
    if !has_endpoints(pool) && !named_by_epp {
        section.reject(
            "endpoints",
            "none",
            r#"at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
        );
    }
}

/// Whether there is a source of endpoints; what a name or a file gives is not known yet.
fn has_endpoints(pool: &Pool) -> bool {
    !pool.endpoints.is_empty() || pool.endpoints_dns.is_some() || pool.endpoints_file.is_some()
}

fn check_failure_mode(section: &Section<'_>, pool: &Pool) {
    match pool.failure_mode {
        FailureMode::Closed if pool.default_upstream.is_some() => {
            section.reject(
                "default_upstream",
                r#"failure_mode "closed", which never uses it"#,
                r#"failure_mode = "open""#,
            );
        }
        FailureMode::Open if pool.default_upstream.is_none() && !has_endpoints(pool) => {
            section.reject("failure_mode", r#""open" without a place to send to"#, "endpoints or default_upstream");
        }
        FailureMode::Closed | FailureMode::Open => {}
    }
}

fn picker(section: &mut Section<'_>) -> Picker {
    #[derive(Clone, Copy)]
    enum Kind {
        Builtin,
        Epp,
    }
    const KINDS: &[(&str, Kind)] = &[("builtin", Kind::Builtin), ("epp", Kind::Epp)];
    const EPP_ONLY: [&str; 10] = [
        "address",
        "tls",
        "ca_file",
        "server_name",
        "connect_timeout",
        "decision_timeout",
        "response_timeout",
        "response_to_picker",
        "response_queue_bytes",
        "header",
    ];
    let epp_settings: Vec<&str> = EPP_ONLY.into_iter().filter(|key| section.has(key)).collect();
    // A wrong `kind` beside settings of an EPP was meant to be one.
    let fallback = if section.has("kind") && !epp_settings.is_empty() { Kind::Epp } else { Kind::Builtin };
    match section.read("kind", value::one_of(KINDS)).unwrap_or(fallback) {
        Kind::Epp => Picker::Epp(epp(section)),
        Kind::Builtin => {
            for key in epp_settings {
                section.reject(key, "a setting of an EPP", r#"kind = "epp" beside it"#);
            }
            Picker::Builtin
        }
    }
}

fn session_headers(section: &mut Section<'_>) -> Vec<http::HeaderName> {
    section.one_or_more("session_header", value::header_name)
}

fn epp(section: &mut Section<'_>) -> Epp {
    const TOLD: &[(&str, ResponseToPicker)] =
        &[("headers", ResponseToPicker::Headers), ("usage", ResponseToPicker::Usage), ("body", ResponseToPicker::Body)];
    let address = section.require("address", "host:port of the EPP", value::host_port).unwrap_or_default();
    let default = Epp::new(address);
    Epp {
        tls: tls(section),
        connect_timeout: section.read("connect_timeout", value::duration).unwrap_or(default.connect_timeout),
        decision_timeout: section.read("decision_timeout", value::duration).unwrap_or(default.decision_timeout),
        response_timeout: section.read("response_timeout", value::duration_or_off).unwrap_or(default.response_timeout),
        response_to_picker: section
            .read("response_to_picker", value::one_of(TOLD))
            .unwrap_or(default.response_to_picker),
        response_queue_bytes: section
            .read("response_queue_bytes", value::integer(64 << 10..=1 << 30))
            .unwrap_or(default.response_queue_bytes),
        header: section.read("header", value::header_name).unwrap_or(default.header),
        address: default.address,
    }
}

fn tls(section: &mut Section<'_>) -> EppTls {
    #[derive(Clone, Copy)]
    enum Mode {
        Off,
        Insecure,
        Ca,
    }
    const MODES: &[(&str, Mode)] = &[("off", Mode::Off), ("insecure", Mode::Insecure), ("ca", Mode::Ca)];
    let mode = section.read("tls", value::one_of(MODES)).unwrap_or(Mode::Off);
    let ca_file = section.read("ca_file", value::non_empty);
    let server_name = section.read("server_name", value::non_empty);
    if matches!(mode, Mode::Off | Mode::Insecure) {
        for key in ["ca_file", "server_name"].into_iter().filter(|key| section.has(key)) {
            section.reject(key, "a setting that nothing uses", r#"tls = "ca" beside it"#);
        }
    }
    match mode {
        Mode::Off => EppTls::Off,
        Mode::Insecure => EppTls::Insecure,
        Mode::Ca => {
            if let Some(name) = server_name.as_deref().filter(|name| ServerName::try_from(*name).is_err()) {
                section.reject("server_name", format_args!("{name:?}"), "a DNS name or an IP address");
            }
            let file = section.folder().join(ca_file.unwrap_or_default());
            if !section.has("ca_file") {
                section.reject("ca_file", "nothing", "the file with the CA's certificate");
            } else if let Err(why) = certificates(&file) {
                section.reject("ca_file", format_args!("{} ({why})", file.display()), "a PEM file with a certificate");
            }
            EppTls::Ca { file, server_name }
        }
    }
}

/// That the file has at least one certificate and nothing that only looks like one.
fn certificates(file: &std::path::Path) -> Result<(), rustls::pki_types::pem::Error> {
    let mut certificates = CertificateDer::pem_file_iter(file)?;
    certificates.next().unwrap_or(Err(rustls::pki_types::pem::Error::NoItemsFound))?;
    certificates.try_for_each(|certificate| certificate.map(drop))
}
