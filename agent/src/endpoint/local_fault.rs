//! Recognises connect errors that this machine causes: out of descriptors, ports or memory, or a local policy. They never count
//! against the endpoint. An EPP's replica is unreachable only if its address causes the error.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use thiserror::Error;

use crate::listeners;

/// connect(2) returns EADDRNOTAVAIL for this, too, although it lasts: IPv6 is off, for instance.
#[derive(Debug, Error)]
#[error("this machine has no address from which {0} can be reached")]
struct NoSource(IpAddr);

/// The error of a connect to `address`, in which a machine without ports and one without an address are told apart.
pub fn connect_error(error: io::Error, address: SocketAddr) -> io::Error {
    let is_unavailable = |error: &io::Error| error.raw_os_error() == Some(libc::EADDRNOTAVAIL);
    // A datagram socket takes no port of TCP's.
    if is_unavailable(&error) && listeners::source(address.ip()).is_err_and(|error| is_unavailable(&error)) {
        return io::Error::new(error.kind(), NoSource(address.ip()));
    }
    error
}

/// The label of a local fault. Returns `None` if the endpoint or the network caused the error.
pub fn local_fault(error: &io::Error) -> Option<&'static str> {
    let inner = error.get_ref();
    if inner.and_then(|inner| inner.downcast_ref::<NoSource>()).is_some() {
        return Some("address_family");
    }
    let Some(code) = error.raw_os_error() else {
        let wrapped = inner?.downcast_ref::<Arc<io::Error>>().map(|shared| &**shared);
        return local_fault(wrapped.or_else(|| inner?.downcast_ref::<io::Error>())?);
    };
    match code {
        libc::EMFILE | libc::ENFILE => Some("open_files"),
        // connect(2) also returns EAGAIN if no local port is free.
        libc::EADDRNOTAVAIL | libc::EADDRINUSE | libc::EAGAIN => Some("ports"),
        libc::ENOBUFS | libc::ENOMEM | libc::ENOSPC => Some("memory"),
        libc::EACCES | libc::EPERM => Some("policy"),
        libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT => Some("address_family"),
        _ => None,
    }
}

/// Whether this machine has run out of descriptors, ports or memory. Other local faults depend on the address and last.
pub fn is_exhaustion(error: &io::Error) -> bool {
    matches!(local_fault(error), Some("open_files" | "ports" | "memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_fault_is_distinguished_from_endpoint_errors() {
        let table = [
            (libc::EMFILE, Some("open_files")),
            (libc::ENFILE, Some("open_files")),
            (libc::EADDRNOTAVAIL, Some("ports")),
            (libc::EAGAIN, Some("ports")),
            (libc::ENOBUFS, Some("memory")),
            (libc::ENOMEM, Some("memory")),
            (libc::EACCES, Some("policy")),
            (libc::EPERM, Some("policy")),
            (libc::EAFNOSUPPORT, Some("address_family")),
            (libc::ECONNREFUSED, None),
            (libc::ECONNRESET, None),
            (libc::ETIMEDOUT, None),
            (libc::EHOSTUNREACH, None),
            (libc::ENETUNREACH, None),
        ];
        for (code, expected) in table {
            let error = || io::Error::from_raw_os_error(code);
            let lasts = matches!(code, libc::EACCES | libc::EPERM | libc::EAFNOSUPPORT);
            assert_eq!(is_exhaustion(&error()), expected.is_some() && !lasts, "{code}");
            assert_eq!(local_fault(&error()), expected, "{code}");
            let shared = io::Error::new(error().kind(), Arc::new(error()));
            assert_eq!(local_fault(&shared), expected, "{code}");
        }
        assert_eq!(local_fault(&io::ErrorKind::TimedOut.into()), None);
    }
}
