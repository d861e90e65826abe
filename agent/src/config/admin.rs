//! `[admin]`: where probes and metrics are served.

use std::net::{Ipv4Addr, SocketAddr};

use super::{
    document::Section,
    listen::{Listen, collide},
    settings::settings,
    value,
};

settings! {
    /// Where probes and metrics are served, and flows of path `wire` are listed and ended.
    pub struct Admin {
        /// Address of the server for `/livez`, `/readyz` and `/metrics`, and over loopback alone for `/config`,
        /// `/drain`, `/flows`, `/log` and `/pools`.
        /// `--admin` and `PENSTOCK_ADMIN` override it.
        pub address: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 9901)) => value::listen_address(),
    }
}

impl Admin {
    pub(super) fn check(&self, section: &Section<'_>, listen: &Listen) {
        let address = self.address;
        if collide(address, listen.address) {
            section.reject("address", address, format_args!("another port than listen.address ({})", listen.address));
        } else if let Some(tls) = &listen.tls
            && collide(address, tls.address)
        {
            section.reject("address", address, format_args!("another port than listen.tls.address ({})", tls.address));
        }
    }
}
