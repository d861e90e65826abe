//! Lets flows follow routes: when routes, addresses or interfaces change, looks up again by which interface packets to a flow's peers
//! leave. A flow that cannot go on is ended, so that both peers see it.
//!
//! The interface at which a flow begins is the one that its own packets took. Where the routing table names another one at that time
//! (it can depend on more than addresses), the flow does not follow.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{NetlinkAddr, bind},
};
use penstock_common::wire::flow::Ends;

use super::{
    netlink::{self, HEADER, NetlinkRequest, attribute},
    registry::{ActiveFlow, FlowStop, Registry},
};

const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
/// Length of `struct rtmsg`.
const ROUTE: usize = 12;
/// Links; addresses, routes and rules of IPv4 and IPv6 (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;
/// How long a flow waits for a route to a peer.
const UNROUTED: Duration = Duration::from_secs(5);
/// Least time between two looks, because changes come in bursts.
const LOOK: Duration = Duration::from_millis(100);
/// A pause is at least this many times as long as the look before it.
const SHARE: u32 = 10;

pub(super) struct Routes {
    socket: OwnedFd,
    /// Whether something has changed since the last look.
    has_changed: bool,
    looked: Instant,
    /// The time from one look to the next.
    pause: Duration,
    followed: HashMap<u64, Followed>,
}

/// What is known of a flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Followed {
    /// For each leg: the routing table named the interface that the flow's packets took. `None`: not looked yet.
    follows: [Option<bool>; 2],
    /// Since when a peer has no route.
    unrouted: Option<Instant>,
}

/// What happens to a leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RouteStep {
    Keep,
    /// The routing table says something else than the packets; the flow does not follow it.
    Ignore,
    Move(u32),
    Wait,
    End,
}

impl Routes {
    /// Follows the routes of this thread's network namespace. Needs no capability.
    pub(super) fn new() -> io::Result<Self> {
        let socket = netlink::open()?;
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        Ok(Self { socket, has_changed: false, looked: Instant::now(), pause: LOOK, followed: HashMap::new() })
    }

    /// Whether a look is due soon.
    pub(super) fn is_pending(&self) -> bool {
        self.has_changed
    }

    /// Reads what has changed.
    pub(super) fn read(&mut self) {
        let mut buffer = [0; 8192];
        loop {
            match nix::unistd::read(&self.socket, &mut buffer) {
                Ok(0) | Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                // Messages were lost.
                Err(_) => {
                    self.has_changed = true;
                    return;
                }
                Ok(_) => self.has_changed = true,
            }
        }
    }

    /// Looks at every flow after a change, and otherwise at those that are new or wait for a route.
    pub(super) fn follow(&mut self, registry: &Registry) {
        if self.has_changed && self.looked.elapsed() < self.pause {
            return;
        }
        let has_changed = std::mem::take(&mut self.has_changed);
        self.looked = Instant::now();
        let mut before = std::mem::take(&mut self.followed);
        for flow in registry.active() {
            let mut followed = before.remove(&flow.id).unwrap_or_default();
            let is_known = followed.follows[0].is_some();
            if (has_changed || !is_known || followed.unrouted.is_some())
                && let Err(error) = look(&mut followed, &flow, registry, has_changed)
            {
                tracing::debug!(%error, "could not look up the routes of a flow");
            }
            self.followed.insert(flow.id, followed);
        }
        self.pause = LOOK.max(self.looked.elapsed() * SHARE);
    }
}

impl AsFd for Routes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn look(followed: &mut Followed, flow: &ActiveFlow, registry: &Registry, has_changed: bool) -> io::Result<()> {
    let interfaces = flow.interfaces.lock().clone();
    let (mut waits, mut ends) = (false, false);
    for (leg, addresses) in flow.table.ends(flow.index).iter().enumerate() {
        let word = &flow.table.words(flow.index).legs[leg].leaves_on;
        // A change may have come before the first look.
        let follows = followed.follows[leg].or(has_changed.then_some(true));
        match step(word.get() as u32, interface_to(addresses)?, follows, &interfaces) {
            RouteStep::Keep => followed.follows[leg] = Some(true),
            RouteStep::Ignore => followed.follows[leg] = Some(false),
            RouteStep::Move(interface) => {
                tracing::info!(leg, from = word.get(), to = interface, "a flow of path wire follows its route");
                word.set(interface.into());
                followed.follows[leg] = Some(true);
            }
            RouteStep::Wait => {
                // Also if the route went before the first look.
                followed.follows[leg] = Some(true);
                waits = true;
            }
            RouteStep::End => ends = true,
        }
    }
    let since = *followed.unrouted.get_or_insert_with(Instant::now);
    if !waits {
        followed.unrouted = None;
    }
    if ends || waits && since.elapsed() >= UNROUTED {
        registry.stop(flow.id, FlowStop::Unrouted);
    }
    Ok(())
}

/// `current`: the interface by which the flow's packets leave. `found`: the one that the routing table names. `follows`: whether they were
/// the same before; `None` at the first look. The programs are attached to `interfaces`.
fn step(current: u32, found: Option<u32>, follows: Option<bool>, interfaces: &[u32]) -> RouteStep {
    match (found, follows) {
        (_, Some(false)) => RouteStep::Ignore,
        (Some(found), _) if found == current => RouteStep::Keep,
        (_, None) => RouteStep::Ignore,
        (None, Some(true)) => RouteStep::Wait,
        (Some(found), Some(true)) if interfaces.contains(&found) => RouteStep::Move(found),
        // The programs do not see that interface.
        (Some(_), Some(true)) => RouteStep::End,
    }
}

/// The interface by which this machine's packets with these ends leave; `None` without a route.
fn interface_to(ends: &Ends) -> io::Result<Option<u32>> {
    let bytes = |words: [u32; 4]| -> [u8; 16] { zerocopy::transmute!(words) };
    let (peer, own) = (bytes(ends.peer), bytes(ends.own));
    let (family, from) = if ends.is_ipv4() { (libc::AF_INET, 12) } else { (libc::AF_INET6, 0) };
    let (peer, own) = (&peer[from..], &own[from..]);
    let bits = (peer.len() * 8) as u8;
    let mut body = [0; ROUTE];
    (body[0], body[1], body[2]) = (family as u8, bits, bits);
    let mut found = None;
    let answered = NetlinkRequest::new(RTM_GETROUTE, 0, &body)
        .attribute(RTA_DST, peer)
        .attribute(RTA_SRC, own)
        .exchange(|answer| {
            let interface = answer.get(HEADER + ROUTE..).and_then(|rest| attribute(rest, RTA_OIF));
            found = interface.and_then(|interface| interface.try_into().ok()).map(u32::from_ne_bytes);
        });
    match answered.map_err(|error| (error.raw_os_error(), error)) {
        Ok(()) => Ok(found),
        // EINVAL: this machine does not have the address any more.
        Err((Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL | libc::EACCES | libc::ENODEV), _)) => Ok(None),
        Err((_, error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_of_the_routing_table_has_its_step() {
        let rows = [
            ((Some(3), None), RouteStep::Keep),
            ((Some(3), Some(true)), RouteStep::Keep),
            ((Some(4), None), RouteStep::Ignore),
            ((None, None), RouteStep::Ignore),
            ((Some(4), Some(false)), RouteStep::Ignore),
            ((None, Some(false)), RouteStep::Ignore),
            ((Some(4), Some(true)), RouteStep::Move(4)),
            ((Some(5), Some(true)), RouteStep::End),
            ((None, Some(true)), RouteStep::Wait),
        ];
        for ((found, follows), expected) in rows {
            assert_eq!(step(3, found, follows, &[3, 4]), expected, "{found:?} {follows:?}");
        }
    }
}
