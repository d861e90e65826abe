//! `[listen]` and `[listen.tls]`: where clients connect.

use std::net::SocketAddr;

use super::{HalfClose, Listen, ListenTls, Overrides, document::Section, value};
use crate::tls::Certificate;

const HALF_CLOSES: &[(&str, HalfClose)] = &[("cancel", HalfClose::Cancel), ("answer", HalfClose::Answer)];

pub(super) fn listen(section: &mut Section<'_>, overrides: &Overrides) -> Listen {
    let default = Listen::default();
    let address = section.read("address", value::listen_address);
    let address = overrides.listen.or(address).unwrap_or(default.address);
    Listen {
        address,
        workers: section.read("workers", value::integer(0..=1024)).unwrap_or(default.workers),
        max_connections: section
            .read("max_connections", value::integer(1..=1_048_576))
            .unwrap_or(default.max_connections),
        http2_max_streams: section
            .read("http2_max_streams", value::integer(0..=65_536))
            .unwrap_or(default.http2_max_streams),
        upgrades: upgrades(section).unwrap_or(default.upgrades),
        tls: tls(section, address),
        http2_resets: section.read("http2_resets", value::integer(1..=1_000_000)).unwrap_or(default.http2_resets),
        http2_control_frames: section
            .read("http2_control_frames", value::integer(100..=1_000_000))
            .unwrap_or(default.http2_control_frames),
        half_close: section.read("half_close", value::one_of(HALF_CLOSES)).unwrap_or(default.half_close),
        tls_handshakes: section.read("tls_handshakes", value::integer(1..=1_048_576)).unwrap_or(default.tls_handshakes),
    }
}

fn upgrades(section: &mut Section<'_>) -> Option<Vec<String>> {
    let given = section.has("upgrades");
    let listed = section.list("upgrades", "an array of protocol names", value::upgrade);
    given.then_some(listed)
}

fn tls(section: &mut Section<'_>, plain: SocketAddr) -> Option<ListenTls> {
    let given = section.has("tls");
    let tls = section.section("tls", |section| {
        if !given {
            return None;
        }
        let address = section.require("address", "ip:port to listen on", value::listen_address);
        let cert_file = section.require("cert_file", "the file with the certificate", value::non_empty);
        let key_file = section.require("key_file", "the file with its key", value::non_empty);
        let folder = section.folder();
        let tls = ListenTls { address: address?, cert_file: folder.join(cert_file?), key_file: folder.join(key_file?) };
        if collide(tls.address, plain) {
            section.reject("address", tls.address, format_args!("another port than listen.address ({plain})"));
        }
        if let Err(why) = Certificate::read(&tls) {
            section.reject("cert_file", why, "PEM files with a certificate and its key");
        }
        Some(tls)
    });
    tls.filter(|_| given)
}

/// Whether the two cannot both be bound.
pub(super) fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}
