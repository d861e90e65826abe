//! Building blocks for tests of the whole agent: position-dependent bytes, an exact client, a sample model server, a scripted
//! endpoint picker, and child processes. The agent uses none of it, and shares only the wire format with it.
//!
//! `E1` and `D1` and so on in comments of tests are rows of `docs/compared.md`.

pub mod agent;
pub mod agent_process;
mod alone;
pub mod api_server;
pub mod bench;
mod between;
pub mod cable;
mod chat;
pub mod client;
pub mod collector;
pub mod content;
mod decoder;
pub mod demo;
pub mod dns_server;
mod eventually;
pub mod http2_client;
pub mod http2_frames;
pub mod http2_server;
pub mod model_server;
mod mounted;
pub mod namespace;
mod own_runtime;
pub mod posts;
pub mod process;
pub mod random;
pub mod reader;
mod refusing;
pub mod scripted_epp;
pub mod sender;
pub mod soak;
pub mod servers;
pub mod stage;
pub mod stress;
mod tap;
pub mod thread_cpu;
pub mod tls;

pub use agent::TestAgent;
pub use alone::alone;
pub use api_server::ApiServer;
pub use between::Between;
pub use client::{BodyEnd, Client, Request, Response};
pub use collector::{CollectedSpan, Collector, CollectorBehaviour};
pub use content::{Alphabet, Checker};
pub use decoder::{Decoder, Framed};
pub use dns_server::DnsServer;
pub use eventually::{eventually, within};
pub use http2_client::Http2Client;
pub use http2_server::{Http2Options, Http2Server};
pub use model_server::{ModelServer, Plan};
pub use mounted::Mounted;
pub use namespace::Namespace;
pub use process::Process;
pub use random::Random;
pub use reader::Reader;
pub use refusing::{Deaf, Refusing, tls_only};
pub use scripted_epp::ScriptedEpp;
pub use sender::Sender;
pub use stage::Stage;
