//! Reads choices and piece lengths from the start of an input.

/// The bytes of an input that make choices. After the last one, every choice is 0.
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

/// Cuts `data` into pieces with the `lengths`, repeated; a length of 0 counts as 1.
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
