//! llhttp inside Node.js: one process for each thread, one query at a time.

use std::{
    cell::RefCell,
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Message;

const SCRIPT: &str = include_str!("llhttp.js");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Request,
    Response,
    ResponseToHead,
}

/// The messages that llhttp found.
#[derive(Debug)]
pub struct Reading {
    /// Complete messages, then an incomplete one, if any.
    pub messages: Vec<Message>,
    /// The number of complete messages.
    pub complete: usize,
    /// llhttp's error code; empty if it took every byte. `UPGRADE` if it stopped at a switch of protocols.
    pub error: String,
}

struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

thread_local! {
    static NODE: RefCell<Option<Node>> = const { RefCell::new(None) };
}

/// Parses `wire`, after which the sender closes.
///
/// # Panics
///
/// If Node.js cannot be started or exits.
pub fn read(kind: Kind, wire: &[u8]) -> Reading {
    NODE.with_borrow_mut(|node| {
        ask(node, kind, wire).expect("Node.js answers (`cargo xtask setup --tests` installs it)")
    })
}

fn ask(node: &mut Option<Node>, kind: Kind, wire: &[u8]) -> Result<Reading> {
    let Node(child) = match node {
        Some(node) => node,
        None => {
            let mut command = Command::new("node");
            command.args(["--no-warnings", "-e", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped());
            node.insert(Node(command.spawn().context("starting node")?))
        }
    };
    let input = child.stdin.as_mut().context("no pipe to node")?;
    let mut question = u32::try_from(wire.len())?.to_le_bytes().to_vec();
    question.push(kind as u8);
    question.extend_from_slice(wire);
    input.write_all(&question)?;
    let output = child.stdout.as_mut().context("no pipe from node")?;
    let mut length = [0; 4];
    output.read_exact(&mut length)?;
    let mut answer = vec![0; u32::from_le_bytes(length) as usize];
    output.read_exact(&mut answer)?;
    let answer: Value = serde_json::from_slice(&answer)?;

    let messages = answer["messages"].as_array().context("messages")?;
    let complete = messages.iter().filter(|message| message["complete"] == true).count();
    let error = answer["error"].as_str().unwrap_or_default().to_owned();
    Ok(Reading { messages: messages.iter().map(message).collect(), complete, error })
}

fn message(found: &Value) -> Message {
    let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
    let field = |pair: &[Value]| {
        let name = pair[0].as_str().unwrap_or_default().to_ascii_lowercase();
        (name, bytes(pair[1].as_str().unwrap_or_default()).trim_ascii().to_vec())
    };
    let fields = found["fields"].as_array().map(Vec::as_slice).unwrap_or_default();
    Message {
        start: text("start"),
        target: text("target"),
        fields: fields.chunks_exact(2).map(field).collect(),
        body: bytes(found["body"].as_str().unwrap_or_default()),
    }
}

/// Node returns bytes as Latin-1 characters.
fn bytes(text: &str) -> Vec<u8> {
    text.chars().map(|c| c as u32 as u8).collect()
}
