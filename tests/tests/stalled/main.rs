//! Clients that stop reading during a response: the bytes in flight stay within the configured buffers, in user space and in
//! the kernel, on every path, and every byte arrives when they continue.

mod many;
mod memory;
mod one;
mod sockets;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// The kernel's limit for automatic growth of a send buffer.
fn wmem() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap();
    text.split_whitespace().last().and_then(|bytes| bytes.parse().ok()).unwrap()
}
