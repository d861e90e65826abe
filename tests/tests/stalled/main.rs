//! Clients that stop reading while their response goes on: what is on its way stays within the buffers that were configured, in
//! user space and in the kernel, on every path, and every byte comes when they go on.

mod many;
mod memory;
mod one;
mod sockets;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// The most that a send buffer grows to by itself.
fn wmem() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap();
    text.split_whitespace().last().and_then(|bytes| bytes.parse().ok()).unwrap()
}
