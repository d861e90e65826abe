//! `[errors]`: the format of the responses that the agent generates itself.

use super::{
    settings::{choice, settings},
    value,
};

settings! {
    /// Responses that the agent generates itself.
    pub struct Errors {
        /// Format of these responses if the `Accept` of the request prefers neither JSON nor plain text.
        pub format: ErrorFormat = ErrorFormat::OpenAi => value::choice(),
    }
}

choice! {
    /// Format of the responses that the agent generates itself.
    pub enum ErrorFormat {
        /// JSON: `{"error": {"message", "type", "param", "code"}}`, or Anthropic's shape on `/v1/messages`.
        OpenAi = "openai",
        /// Plain text: the message, and the reason on its own line.
        Plain = "plain",
    }
}
