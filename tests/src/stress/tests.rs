//! What a stress run reports about an inexact agent, simulated by a proxy with one fault.

use std::{io, net::SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::case::Exchange;
use super::tally::Tally;
use super::*;
use crate::Reader;
use crate::content::Mismatch;
use crate::model_server::{Framing, Plan, Upgraded};
use case::{Taking, Upload};

/// What happens to a stream at this byte.
#[derive(Clone, Copy, Debug)]
enum Misdeed {
    None,
    Lose(usize),
    Repeat(usize),
    Swap,
    End,
}

const AT: usize = 40_000;

fn garble(body: &mut Vec<u8>, misdeed: Misdeed) {
    match misdeed {
        Misdeed::None => {}
        Misdeed::Lose(n) => drop(body.drain(AT..AT + n)),
        Misdeed::Repeat(n) => {
            let again = body[AT - n..AT].to_vec();
            body.splice(AT..AT, again);
        }
        Misdeed::Swap => body.swap(AT, AT + 1),
        Misdeed::End => body.truncate(AT),
    }
}

/// Relays one connection: the whole response with a fault in its body, or the client's bytes after the head.
async fn proxy(to: SocketAddr, down: Misdeed, up: Misdeed) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await?;
        let mut server = TcpStream::connect(to).await?;
        server.write_all(&head(&mut client).await?).await?;
        client.write_all(&head(&mut server).await?).await?;
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::try_join!(pass(from_client, to_server, up), pass(from_server, to_client, down))
    });
    addr
}

async fn pass(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, misdeed: Misdeed) -> io::Result<()> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).await?;
    garble(&mut bytes, misdeed);
    to.write_all(&bytes).await?;
    to.shutdown().await
}

async fn head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(head)
}

fn case(exchange: Exchange) -> Case {
    Case { fresh: true, rcvbuf: None, exchange }
}

fn response() -> Case {
    let plan = Plan { framing: Framing::UntilClose, size: 100_000, stream_id: 3, ..Plan::default() };
    case(Exchange::Response { plan, head_only: false, body: None, streamed: false, taking: Taking::All(Reader::Fast) })
}

fn switch() -> Case {
    let plan = Plan { size: 100_000, stream_id: 3, upload: Some(5), ..Plan::switching("websocket", Upgraded::Send) };
    let upload = Upload { stream_id: 5, size: 100_000, writes: plan.writes, pauses: None };
    case(Exchange::Switch { plan, upload, taking: Taking::All(Reader::Fast) })
}

/// The tally's complaint about one case through the proxy.
async fn complaint(case: &Case, down: Misdeed, up: Misdeed) -> (Tally, Option<anyhow::Error>) {
    let options = ServerOptions { idle_close: None, ..ServerOptions::default() };
    let servers = [ModelServer::start(options).await.unwrap()];
    let client = Client::connect(proxy(servers[0].addr, down, up).await).await.unwrap();
    let mut tally = Tally::new(SteeringMode::Off);
    match exchange::run(client, case, "1", &servers).await {
        Ok(done) => {
            tally.done(case, done.outcome, done.bytes);
            (tally, None)
        }
        Err(error) => {
            tally.fail("here", &error);
            (tally, Some(error))
        }
    }
}

#[tokio::test]
async fn correct_exchange_passes() {
    for case in [response(), switch()] {
        let (tally, error) = complaint(&case, Misdeed::None, Misdeed::None).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!((tally.complete, tally.failed(), tally.read), (1, 0, 100_000));
    }
}

#[tokio::test]
async fn corrupt_byte_is_reported_with_its_offset() {
    for (misdeed, offset, shift) in
        [(Misdeed::Lose(5), 40_000, Some(5)), (Misdeed::Repeat(3), 40_000, Some(-3)), (Misdeed::Swap, 40_000, None)]
    {
        let of_both = [
            (response(), misdeed, Misdeed::None),
            (switch(), misdeed, Misdeed::None),
            (switch(), Misdeed::None, misdeed),
        ];
        for (case, down, up) in of_both {
            let (tally, error) = complaint(&case, down, up).await;
            let error = error.expect("the case passed");
            let found = error.downcast_ref::<Mismatch>().unwrap_or_else(|| panic!("{error:#}"));
            assert_eq!((found.offset, found.shift), (offset, shift), "{case:?}");
            assert_eq!((tally.wrong, tally.failed()), (1, 1));
            assert!(tally.complaints()[0].contains(&format!("differs at byte {offset}")), "{:?}", tally.complaints());
        }
    }
}

#[tokio::test]
async fn early_orderly_close_is_reported() {
    let of_both = [(switch(), Misdeed::End, Misdeed::None), (switch(), Misdeed::None, Misdeed::End)];
    for (case, down, up) in of_both {
        let (tally, error) = complaint(&case, down, up).await;
        assert_eq!((tally.short, tally.failed()), (1, 1), "{error:?}");
        assert!(tally.complaints()[0].contains("after 40000 bytes of 100000"), "{:?}", tally.complaints());
    }
    let (tally, error) = complaint(&response(), Misdeed::End, Misdeed::None).await;
    assert_eq!((tally.short, tally.failed()), (1, 1), "{error:?}");
}

#[test]
fn unused_path_is_reported() {
    for mode in SteeringMode::value_variants() {
        let mut tally = Tally::new(*mode);
        tally.complete = 1;
        tally.overwritten = [1, 0];
        assert_eq!(tally.complaints().len(), paths(*mode).len());
        for path in paths(*mode) {
            tally.counters.add(&Counters::read(&format!("penstock_body_bytes_total{{path=\"{path}\"}} 1\n")));
        }
        assert_eq!(tally.complaints(), Vec::<String>::new());
    }
}

#[test]
fn failure_report_names_reproduction_command() {
    assert_eq!(reproduce(SteeringMode::Ingress, 7), "reproduce: cargo xtask stress --mode ingress --seed 7");
}
