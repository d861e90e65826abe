use super::*;
use crate::config::Config;

#[test]
fn every_socket_is_accepted_from_and_every_worker_accepts() {
    for sockets in 1..12 {
        for count in 1..12 {
            let shares = shares(sockets, count);
            assert_eq!(shares.len(), count);
            assert!(shares.iter().all(|share| !share.is_empty()), "{sockets} {count}: {shares:?}");
            assert!((0..sockets).all(|socket| shares.iter().any(|share| share.contains(&socket))));
            let own = |share: &Vec<usize>| {
                share.iter().filter(|one| shares.iter().filter(|other| other.contains(one)).count() == 1).count()
            };
            if sockets >= count && count > 1 {
                assert!(shares.iter().all(|share| own(share) == sockets / count), "{sockets} {count}: {shares:?}");
            }
        }
    }
}

#[test]
fn inherited_sockets_are_kept_and_completed() {
    let passed = bind("127.0.0.1:0".parse().unwrap(), 2).unwrap();
    let address = passed[0].local_addr().unwrap();
    for (count, expected) in [(1, 2), (2, 2), (5, 5)] {
        let passed = passed.iter().map(|socket| Passed::duplicate(Role::Listen, false, socket).unwrap()).collect();
        let group = ListenGroup::open(Role::Listen, "127.0.0.1:0".parse().unwrap(), count, passed).unwrap();
        assert_eq!((group.sockets.len(), group.address), (expected, address));
    }
    // The service manager's get none beside them.
    let held = passed.iter().map(|socket| Passed::duplicate(Role::Listen, true, socket).unwrap()).collect();
    let group = ListenGroup::open(Role::Listen, "127.0.0.1:0".parse().unwrap(), 5, held).unwrap();
    assert_eq!((group.sockets.len(), group.address), (2, address));
    // A socket without SO_REUSEPORT, as a service manager may pass.
    let single = TcpListener::bind("127.0.0.1:0").unwrap();
    let passed = vec![Passed::duplicate(Role::Listen, true, &single).unwrap()];
    let group = ListenGroup::open(Role::Listen, "0.0.0.0:1".parse().unwrap(), 4, passed).unwrap();
    assert!(group.held && group.sockets.len() == 1 && group.address == single.local_addr().unwrap());
}

fn any_port() -> Listen {
    let mut listen = Config::new(Vec::new()).listen;
    listen.address = "127.0.0.1:0".parse().unwrap();
    listen
}

fn open(listen: &Listen, count: usize) -> Sockets {
    Sockets::open(listen, count, &mut Inherited::default()).unwrap()
}

/// A socket that another process has, too, is closed without waiting for its queue, which is the other's.
#[test]
fn lent_sockets_are_released() {
    let stopped = |lend: fn(Loan) -> Option<Loan>| {
        let mut sockets = open(&any_port(), 1);
        let (_passed, loan) = sockets.passed().unwrap();
        let _loan = lend(loan);
        let stop = sockets.plain().stop.subscribe();
        sockets.close();
        *stop.borrow()
    };
    assert_eq!(stopped(Some), Stop::Released);
    assert_eq!(stopped(|_over| None), Stop::Closed);
    assert_eq!(
        stopped(|loan| {
            loan.keep();
            None
        }),
        Stop::Released
    );
}

#[test]
fn another_process_gets_all_sockets_of_an_address_or_none() {
    let mut sockets = open(&any_port(), 2);
    let elsewhere = Listen { address: "127.0.0.2:0".parse().unwrap(), ..any_port() };
    let (passed, loan) = sockets.passed().unwrap();
    assert_eq!(passed.len(), 2);
    // Lent: no more sockets, and no other address.
    let change = sockets.prepare(&any_port(), 4, true).unwrap();
    assert!(change.is_empty() && change.groups[0].sockets.len() == 2);
    let refused = format!("{:#}", sockets.prepare(&elsewhere, 4, true).err().unwrap());
    assert_eq!(refused, "cannot listen on 127.0.0.2:0: another agent is taking the present sockets over");
    drop(loan);
    // Not lent while a change is prepared, and all of them afterwards.
    for listen in [any_port(), elsewhere] {
        let change = sockets.prepare(&listen, 4, true).unwrap();
        assert!(sockets.passed().unwrap_err().to_string().contains("after its reload"));
        drop(change);
        assert!(sockets.passed().is_ok());
    }
    let change = sockets.prepare(&any_port(), 4, true).unwrap();
    drop(sockets.apply(change).unwrap());
    assert_eq!(sockets.passed().unwrap().0.len(), 4);
}

#[test]
fn sockets_of_a_service_manager_stay_as_they_are() {
    let single = TcpListener::bind("127.0.0.1:0").unwrap();
    let passed = Passed::duplicate(Role::Listen, true, &single).unwrap();
    let mut sockets = Sockets::open(&any_port(), 1, &mut Inherited::new(Vec::new(), vec![passed])).unwrap();
    for address in ["127.0.0.1:0", "127.0.0.2:0"] {
        let listen = Listen { address: address.parse().unwrap(), ..any_port() };
        let change = sockets.prepare(&listen, 4, true).unwrap();
        assert!(change.is_empty());
        let (listeners, replaced) = sockets.apply(change).unwrap();
        assert_eq!(listeners.iter().map(Vec::len).collect::<Vec<_>>(), [1; 4]);
        assert_eq!(replaced.is_kept, [true]);
        assert!(sockets.plain().held && sockets.address() == single.local_addr().unwrap());
    }
}

/// Until the last moment the other socket does not listen, so that the address can be bound.
#[test]
fn change_that_cannot_listen_leaves_the_present_sockets() {
    let mut sockets = open(&any_port(), 2);
    let before = sockets.address();
    let listeners = sockets.listen(2).unwrap();
    let other = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    other.set_reuse_address(true).unwrap();
    other.bind(&"127.0.0.2:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    let address = other.local_addr().unwrap().as_socket().unwrap();
    let change = sockets.prepare(&Listen { address, ..any_port() }, 3, true).unwrap();
    other.listen(1).unwrap();
    assert_eq!(sockets.apply(change).err().unwrap().kind(), io::ErrorKind::AddrInUse);
    assert!(sockets.address() == before && sockets.passed().unwrap().0.len() == 2);
    assert!(listeners.iter().flatten().all(|listener| *listener.stop.borrow() == Stop::No));
}

#[test]
fn sockets_of_another_address_are_closed_and_those_kept_are_released() {
    let mut sockets = open(&any_port(), 2);
    for (address, expected) in [("127.0.0.1:0", Stop::Released), ("127.0.0.2:0", Stop::Closed)] {
        let before = sockets.listen(2).unwrap();
        let listen = Listen { address: address.parse().unwrap(), ..any_port() };
        let change = sockets.prepare(&listen, 3, true).unwrap();
        let (listeners, replaced) = sockets.apply(change).unwrap();
        let stopped = |listeners: &[Vec<Listener>], stop| {
            listeners.iter().flatten().all(|listener| *listener.stop.borrow() == stop)
        };
        assert!(stopped(&before, Stop::No));
        drop(replaced);
        assert!(stopped(&before, expected) && stopped(&listeners, Stop::No), "{address}");
    }
}
