//! Runs every target on its corpus and on mutations of it with a fixed seed, so that found faults stay fixed.

use std::{fs, path::PathBuf};

use penstock_fuzz::TARGETS;

/// Mutated inputs for each target.
const MUTATED: usize = 300;
const LONGEST: usize = 4096;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder entry").path())
        .collect();
    files.sort();
    files.into_iter().map(|file| fs::read(file).expect("a file of the corpus")).collect()
}

fn mutated(random: &mut fastrand::Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[random.usize(..corpus.len())].clone();
    for _ in 0..random.usize(1..6) {
        let at = random.usize(..=input.len());
        match random.u8(..5) {
            0 => input.insert(at, random.u8(..)),
            1 if at < input.len() => input[at] = random.u8(..),
            2 if at < input.len() => drop(input.remove(at)),
            3 => input.truncate(at),
            _ => {
                let other = &corpus[random.usize(..corpus.len())];
                let from = random.usize(..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(LONGEST);
    input
}

fn runs(target: &str) {
    let (_, run) = TARGETS.into_iter().find(|(name, _)| *name == target).expect("a target");
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "{target} has no corpus");
    corpus.iter().for_each(|input| run(input));
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..MUTATED {
        let input = mutated(&mut random, &corpus);
        if let Err(panic) = std::panic::catch_unwind(|| run(&input)) {
            eprintln!("failing input: {}", input.escape_ascii());
            std::panic::resume_unwind(panic);
        }
    }
}

macro_rules! targets {
    ($($test:ident: $target:literal,)*) => {
        $(#[test]
        fn $test() {
            runs($target);
        })*

        #[test]
        fn every_target_has_a_test() {
            let run = [$($target),*];
            assert_eq!(TARGETS.map(|(name, _)| name), run);
        }
    };
}

targets! {
    request_head_corpus_is_read_alike_by_all_parsers: "request_head",
    response_head_corpus_is_read_alike_by_all_parsers: "response_head",
    http2_request_corpus_is_forwarded_as_one_request: "http2_request",
    body_corpus_ends_at_its_last_byte: "body",
    steered_corpus_arrives_once_and_in_order: "steered",
    exchange_corpus_decides_at_most_once: "exchange",
    configuration_corpus_is_parsed_or_rejected_with_lines: "configuration",
    model_scan_corpus_agrees_with_serde_json: "model_scan",
    events_corpus_yields_usage: "events",
    wire_corpus_is_rewritten_there_and_back: "wire",
}
