//! What the tests of the whole agent are made of: bytes that know their place, an exact client, a sample model server, a
//! scripted endpoint picker, and child processes. Nothing here is used by the agent, and nothing but the wire is shared
//! with it.

pub mod agent;
pub mod client;
pub mod content;
mod decoder;
pub mod demo;
mod eventually;
pub mod model_server;
mod own_runtime;
pub mod process;
pub mod scripted_epp;

pub use client::{BodyEnd, Client, Request, Response};
pub use content::{Alphabet, Checker};
pub use decoder::{Decoder, Framed};
pub use eventually::eventually;
pub use model_server::{ModelServer, Plan};
pub use process::Process;
pub use scripted_epp::ScriptedEpp;
