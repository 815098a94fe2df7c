//! Percentiles of how long requests took.

use std::time::Duration;

/// Every one that was measured.
#[derive(Default)]
pub struct Latencies {
    micros: Vec<u32>,
}

impl Latencies {
    pub fn add(&mut self, took: Duration) {
        self.micros.push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }

    pub fn append(&mut self, mut other: Self) {
        self.micros.append(&mut other.micros);
    }

    pub fn count(&self) -> usize {
        self.micros.len()
    }

    pub fn sorted(mut self) -> Sorted {
        self.micros.sort_unstable();
        Sorted { micros: self.micros }
    }
}

/// The same in order, from which percentiles are read.
pub struct Sorted {
    micros: Vec<u32>,
}

impl Sorted {
    /// The least value that so many thousandths of all do not exceed; 0 without any.
    pub fn per_mille(&self, share: usize) -> u32 {
        let rank = (self.micros.len() * share).div_ceil(1000).max(1);
        self.micros.get(rank - 1).copied().unwrap_or(0)
    }
}
