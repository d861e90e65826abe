//! Reserved file descriptors, so that a connection can still be accepted after the process has run out of them.
//!
//! A reserved descriptor is open on `/dev/null`. [`Reserve::release`] closes one, so that the next `accept` gets its
//! number. [`Reserve::reclaim`] closes that connection and takes the number back atomically, so that no other thread
//! can take it.

use std::{cell::RefCell, fs::File, io, os::fd::OwnedFd};

use tokio::net::TcpStream;

pub struct Reserve {
    size: usize,
    held: RefCell<Vec<OwnedFd>>,
}

impl Reserve {
    /// Opens `size` descriptors, or as many as are available.
    pub fn new(size: usize) -> Self {
        let reserve = Self { size, held: RefCell::default() };
        reserve.refill();
        reserve
    }

    /// Closes one reserved descriptor; false if none is left.
    pub fn release(&self) -> bool {
        self.held.borrow_mut().pop().is_some()
    }

    /// Opens released descriptors again, as far as the process can.
    pub fn refill(&self) {
        let mut held = self.held.borrow_mut();
        while held.len() < self.size
            && let Ok(null) = File::open("/dev/null")
        {
            held.push(null.into());
        }
    }

    /// Closes `stream` and keeps its descriptor, unless the reserve is full.
    pub fn reclaim(&self, stream: TcpStream) {
        let mut held = self.held.borrow_mut();
        if held.len() == self.size {
            return;
        }
        let Ok(stream) = stream.into_std() else { return };
        let mut number = OwnedFd::from(stream);
        match held.last() {
            // dup2 onto an open descriptor closes it.
            Some(null) if nix::unistd::dup2(null, &mut number).is_ok() => held.push(number),
            Some(_) => {}
            None => {
                drop(number);
                held.extend(File::open("/dev/null").ok().map(OwnedFd::from));
            }
        }
    }
}

/// Whether the process or the machine has no descriptor or memory for another connection.
pub fn is_exhausted(error: &io::Error) -> bool {
    use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOBUFS | ENOMEM))
}

/// Whether the error concerns the queued connection rather than the listener.
pub fn is_of_the_connection(error: &io::Error) -> bool {
    use nix::libc::{
        ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO,
    };
    let of_it =
        [ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO];
    error.raw_os_error().is_some_and(|number| of_it.contains(&number))
}

/// Raises RLIMIT_NOFILE to its hard limit, because a request may hold two descriptors, and a client of `penstock epp` one.
pub fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "could not raise RLIMIT_NOFILE");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[tokio::test]
    async fn reclaimed_connection_closes_and_its_descriptor_stays_open() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let number = accepted.as_raw_fd();
        let reserve = Reserve::new(2);
        assert!(reserve.release());
        reserve.reclaim(accepted);
        assert!(reserve.held.borrow().iter().any(|fd| fd.as_raw_fd() == number));
        client.readable().await.unwrap();
        assert_eq!(client.try_read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn released_descriptors_are_opened_again() {
        let reserve = Reserve::new(2);
        assert!(reserve.release() && reserve.release() && !reserve.release());
        reserve.refill();
        assert!(reserve.release() && reserve.release());
    }
}
