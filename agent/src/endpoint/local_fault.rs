//! Recognises connect errors that this machine causes: out of descriptors, ports or memory, or a local policy. They never count
//! against the endpoint. An EPP's replica is unreachable only if its address causes the error.

use std::{io, sync::Arc};

/// The label of a local fault. Returns `None` if the endpoint or the network caused the error.
pub fn local_fault(error: &io::Error) -> Option<&'static str> {
    match raw_os_error(error)? {
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

/// The OS error of `error` or of the error that it wraps.
fn raw_os_error(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        let inner = error.get_ref()?;
        let wrapped = inner.downcast_ref::<Arc<io::Error>>().map(|shared| &**shared);
        raw_os_error(wrapped.or_else(|| inner.downcast_ref::<io::Error>())?)
    })
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
