//! What targets read off the front of their input: choices and places to cut.

/// Bytes of an input that make choices; when they are used up, every choice is 0.
pub(crate) struct Choices<'d> {
    rest: &'d [u8],
}

impl<'d> Choices<'d> {
    pub(crate) fn new(data: &'d [u8]) -> Self {
        Self { rest: data }
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        *first
    }
}

/// Splits an input into `count` leading choices and the rest.
pub(crate) fn split(data: &[u8], count: usize) -> (Choices<'_>, &[u8]) {
    let (choices, rest) = data.split_at(count.min(data.len()));
    (Choices::new(choices), rest)
}

/// `data` in pieces whose lengths repeat those of `lengths`; no length is 0.
pub(crate) fn pieces(mut data: &[u8], lengths: [u8; 3]) -> impl Iterator<Item = &[u8]> {
    let mut lengths = lengths.into_iter().cycle();
    std::iter::from_fn(move || {
        if data.is_empty() {
            return None;
        }
        let length = usize::from(lengths.next().unwrap_or_default()).max(1);
        let (piece, rest) = data.split_at(length.min(data.len()));
        data = rest;
        Some(piece)
    })
}
