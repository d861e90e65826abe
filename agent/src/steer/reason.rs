//! Why a flow is steered or relayed: one label for each reason, in metrics, access log and spans.
//!
//! The comments say where a reason is given. `docs/steering.md` lists every reason with the sentence that stands here; a test compares
//! the two.

/// Declares the reasons: the doc comment of each is its description.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $label:literal,)+) => {
        /// Why a flow takes the path that it takes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum SteerReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl SteerReason {
            pub const ALL: [Self; [$($label),+].len()] = [$(Self::$variant),+];

            /// Metric label.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)+
                }
            }

            /// What the reason means, in one sentence.
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

reasons! {
    // `choose` in `eligibility.rs`: the kernel gets the flow.
    /// The body has a Content-Length within the limits.
    Length = "length",
    /// The response is an event stream.
    EventStream = "event_stream",
    /// The body is chunked, and its endpoint is on this node.
    Chunked = "chunked",
    /// The close of the connection ends the body, and its endpoint is on this node.
    UntilClose = "until_close",
    /// `steering.mode` names the path.
    Forced = "forced",

    // `choose` in `eligibility.rs`: user space relays it.
    /// The whole body was read together with the head, or there is no body.
    Complete = "complete",
    /// `steering.mode` is `off`.
    Off = "off",
    /// The client speaks TLS.
    Tls = "tls",
    /// The endpoint speaks TLS (`app_protocol = "https"`).
    EndpointTls = "endpoint_tls",
    /// The client has closed its sending side and is answered all the same (`listen.half_close`).
    HalfClose = "half_close",
    /// The client speaks HTTP/1.0 and the body is chunked, so the agent decodes it.
    Http10 = "http10",
    /// The EPP needs the whole body, or the kernel cannot keep its end.
    ResponseToPicker = "response_to_picker",
    /// The connection to the endpoint has no slot: no path passed its self-test, or no slot was free.
    Unavailable = "unavailable",
    /// `steering.mode` is `local`, and the endpoint's own socket cannot be used.
    NotLocal = "not_local",
    /// The Content-Length is below `steering.min_bytes`.
    Small = "small",
    /// The endpoint is on another node, and the Content-Length is above `steering.max_remote_bytes`.
    LargeRemote = "large_remote",
    /// The endpoint is on another node, and the length of the body is not known.
    UnsizedRemote = "unsized_remote",

    // `Eligibility::response` in `eligibility.rs`, after the choice.
    /// The kernel refused the client's socket as a target.
    TargetRefused = "target_refused",

    // `may_watch` and `may_begin` in `wire.rs`, besides some of the above.
    /// With `mode = "wire"`: the request does not ask for a stream.
    NotStreamed = "not_streamed",
    /// With `mode = "wire"`: the pool's `pick_per` is not `request`.
    PickPer = "pick_per",
    /// With `mode = "wire"`: the client has sent the beginning of its next request.
    Pipelined = "pipelined",
    /// With `mode = "wire"`: the connections of client and endpoint cannot become one.
    Unfit = "unfit",

    // `carry` in `proxy/respond/carry.rs`: the client does not get the endpoint's bytes, or gets a tunnel.
    /// The client or the endpoint speaks HTTP/2.
    Http2 = "http2",
    /// The EPP sent the request under another model name, and the agent restores the client's name in the response.
    ModelRenamed = "model_renamed",
    /// The pool has `sse_keepalive`, and the response is an event stream.
    SseKeepalive = "sse_keepalive",
    /// The EPP answers for the response's body (`response_to_picker = "body"`).
    PickerBody = "picker_body",
    /// The protocol was switched: bytes go both ways until both sides have closed.
    Upgrade = "upgrade",

    // `bytes` in `proxy/respond/carry.rs`, in place of the chosen reason.
    /// With `mode = "wire"`: packets of the connections do not pass the agent's interfaces under the addresses of its sockets.
    Nat = "nat",

    // `delivered` in `proxy/record.rs`, in place of the chosen reason.
    /// The whole body arrived before the kernel could be armed, or a flow on path `wire` did not begin.
    Arrived = "arrived",
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use penstock_common::slot::{admission, stop};

    use super::*;

    const DOCUMENT: &str = include_str!("../../../docs/steering.md");

    /// The rows of a section's table: label and the next column.
    fn rows(title: &str) -> BTreeMap<&'static str, &'static str> {
        let (_, section) = DOCUMENT.split_once(&format!("## {title}\n")).expect(title);
        let section = section.split("\n## ").next().expect("a section");
        let rows: Vec<_> = section
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|row| {
                let (label, rest) = row.split_once("` | ").expect(row);
                (label, rest.split(" |").next().expect(row))
            })
            .collect();
        let map: BTreeMap<_, _> = rows.iter().copied().collect();
        assert_eq!(map.len(), rows.len(), "{title}: a label has two rows");
        map
    }

    #[test]
    fn every_reason_is_documented_with_its_description() {
        let documented: BTreeMap<_, _> = ["Why a flow was steered", "Why a flow was not steered"]
            .into_iter()
            .flat_map(rows)
            .map(|(label, description)| (label, description.to_owned()))
            .collect();
        let declared = SteerReason::ALL.map(|reason| {
            let sentence = reason.description().strip_suffix('.').expect("a sentence");
            let mut letters = sentence.chars();
            let first = letters.next().expect("a word").to_lowercase();
            (reason.label(), format!("{first}{}", letters.as_str()))
        });
        assert_eq!(documented, BTreeMap::from(declared));
    }

    #[test]
    fn every_stop_reason_is_documented() {
        let declared: Vec<_> = (1..stop::COUNT as u32).map(stop::label).collect();
        let mut sorted = declared.clone();
        sorted.sort_unstable();
        assert_eq!(rows("What stops a steered flow").into_keys().collect::<Vec<_>>(), sorted);
        assert!(!declared.contains(&stop::label(0)), "a stop reason without a label");
    }

    #[test]
    fn every_refusal_of_an_endpoint_socket_is_documented() {
        let mut declared: Vec<_> = (admission::DONE + 1..=admission::IN_USE).map(admission::label).collect();
        declared.sort_unstable();
        assert_eq!(rows("Why an endpoint's own socket was not used").into_keys().collect::<Vec<_>>(), declared);
    }
}
