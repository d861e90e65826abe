//! Tests socket counters on loopback connections.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
};

use super::*;

/// Also while acknowledgements arrive: an account that begins while the peer acknowledges earlier bytes must still
/// match later.
#[test]
fn bytes_written_equals_the_bytes_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut reader, _) = listener.accept().unwrap();
    let taking = std::thread::spawn(move || {
        let mut taken = 0;
        let mut buffer = [0; 3000];
        while let Ok(n @ 1..) = reader.read(&mut buffer) {
            taken += n as u64;
        }
        taken
    });
    let mut written = 0;
    for round in 0..20_000_usize {
        writer.write_all(&[0; 50_000][..1000 + round]).unwrap();
        written += 1000 + round as u64;
        for _ in 0..5 {
            assert_eq!(bytes_written(&writer).unwrap(), written + 1, "in round {round}");
        }
    }
    drop(writer);
    assert_eq!(taking.join().unwrap(), written);
}
