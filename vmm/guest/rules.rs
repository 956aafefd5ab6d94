//! The write rules: which page is written next and what a page holds after so many writes.
//!
//! Pure arithmetic modulo 2^64, compiled into the guest (which applies it step by step) and into the
//! library (whose check uses the closed form).

use super::layout::{contents, order};

/// Words in a page.
pub(crate) const PAGE_WORDS: usize = 512;

/// 2^64 divided by the golden ratio, odd: the step of splitmix64.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Knuth's multiplier for MMIX. It is 1 modulo 4, so with an odd increment the generator has full period
/// in any number of low bits.
pub(crate) const MULTIPLIER: u64 = 6_364_136_223_846_793_005;

/// What undoes a multiplication by [`MULTIPLIER`], by Newton's iteration: each step doubles the bits that are right.
const INVERSE_MULTIPLIER: u64 = {
    let mut inverse: u64 = MULTIPLIER; // Right in three bits, as for every odd number.
    let mut right_bits = 3;
    while right_bits < u64::BITS {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(MULTIPLIER.wrapping_mul(inverse)));
        right_bits *= 2;
    }
    inverse
};

/// splitmix64: the output function applied to the state that follows `x`.
#[inline(always)]
pub(crate) const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What distinguishes a page's contents from all others'.
#[inline(always)]
pub(crate) const fn page_key(seed: u64, frame: u64) -> u64 {
    mix(mix(seed).wrapping_add(frame.wrapping_mul(GOLDEN)))
}

/// What distinguishes a vCPU's sequence of pages from all others'.
#[inline(always)]
pub(crate) const fn sequence_key(seed: u64, vcpu: u64) -> u64 {
    mix(mix(!seed).wrapping_add(vcpu))
}

/// Which word of a page is written where one write is one word.
#[inline(always)]
pub(crate) const fn word_index(page_key: u64) -> usize {
    (page_key >> 55) as usize
}

/// How words of one kind of contents begin and evolve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WordRule {
    /// The bits of a word that evolve; the others stay as the fill made them.
    pub(crate) mask: u64,
    /// 2 to this power neighbouring words are alike.
    pub(crate) group_shift: u32,
}

impl WordRule {
    /// The rule for a value of the contents setting.
    #[inline(always)]
    pub(crate) const fn new(contents_setting: u32) -> Option<Self> {
        match contents_setting {
            contents::RANDOM => Some(Self { mask: u64::MAX, group_shift: 0 }),
            contents::COMPRESSIBLE => Some(Self { mask: 0xffff, group_shift: 1 }),
            _ => None,
        }
    }

    /// What the fill writes to word `word` of the page with this key.
    #[inline(always)]
    pub(crate) const fn initial(self, page_key: u64, word: usize) -> u64 {
        let group = (word as u64) >> self.group_shift;
        let own = mix(page_key.wrapping_add(group.wrapping_mul(GOLDEN)));
        (page_key & !self.mask) | (own & self.mask)
    }

    /// The generator's increment for word `word` of the page with this key: always odd.
    #[inline(always)]
    pub(crate) const fn increment(self, page_key: u64, word: usize) -> u64 {
        let group = (word as u64) >> self.group_shift;
        (page_key | 1).wrapping_add(group.wrapping_mul(GOLDEN.wrapping_mul(2)))
    }

    /// One write.
    #[inline(always)]
    pub(crate) const fn step(self, value: u64, increment: u64) -> u64 {
        let next = value.wrapping_mul(MULTIPLIER).wrapping_add(increment);
        (value & !self.mask) | (next & self.mask)
    }

    /// What a word was before a write that made it `value`.
    #[inline(always)]
    pub(crate) const fn step_back(self, value: u64, increment: u64) -> u64 {
        let previous = value.wrapping_sub(increment).wrapping_mul(INVERSE_MULTIPLIER);
        (value & !self.mask) | (previous & self.mask)
    }

    /// As many writes as `jump` stands for.
    #[inline(always)]
    pub(crate) const fn jump(self, value: u64, increment: u64, jump: Jump) -> u64 {
        let next = value.wrapping_mul(jump.power).wrapping_add(increment.wrapping_mul(jump.sum));
        (value & !self.mask) | (next & self.mask)
    }
}

/// k steps of the generator in one: `w·A^k + B·(1 + A + … + A^(k−1))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    /// A^k.
    pub(crate) power: u64,
    /// 1 + A + … + A^(k−1).
    pub(crate) sum: u64,
}

impl Jump {
    /// The jump over `steps` writes.
    pub(crate) const fn new(steps: u64) -> Self {
        // Square and multiply on the map w → power·w + sum.
        let mut result = Self { power: 1, sum: 0 };
        let mut square = Self { power: MULTIPLIER, sum: 1 };
        let mut left = steps;
        while left != 0 {
            if left & 1 == 1 {
                result = result.then(square);
            }
            square = square.then(square);
            left >>= 1;
        }
        result
    }

    /// This jump followed by `next`.
    pub(crate) const fn then(self, next: Self) -> Self {
        Self {
            power: self.power.wrapping_mul(next.power),
            sum: self.sum.wrapping_mul(next.power).wrapping_add(next.sum),
        }
    }
}

/// How many of `vcpus` vCPUs write, for a value of the writers setting.
#[inline(always)]
pub(crate) const fn writers(setting: u32, vcpus: u64) -> u64 {
    if setting == 0 || setting as u64 > vcpus { vcpus } else { setting as u64 }
}

/// The part of the working set that a vCPU writes, where the first `writers` do: its first page and how many.
#[inline(always)]
pub(crate) const fn share(total: u64, vcpu: u64, writers: u64) -> (u64, u64) {
    if vcpu >= writers {
        return (total, 0);
    }
    let first = total * vcpu / writers;
    (first, total * (vcpu + 1) / writers - first)
}

/// The order in which a vCPU visits the `pages` pages of its part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    order: u32,
    key: u64,
    pages: u64,
    hot_pages: u64,
}

/// Of 2^32 draws this many are hot: 90 %.
const HOT_DRAWS: u64 = 3_865_470_566;

impl Sequence {
    /// The sequence of one vCPU, for a value of the order setting. `pages` must be below 2^32.
    #[inline(always)]
    pub(crate) const fn new(order_setting: u32, seed: u64, vcpu: u64, pages: u64) -> Option<Self> {
        match order_setting {
            order::SEQ | order::RANDOM | order::HOT_COLD => {}
            _ => return None,
        }
        let hot_pages = if pages < 10 { 1 } else { pages / 10 };
        Some(Self { order: order_setting, key: sequence_key(seed, vcpu), pages, hot_pages })
    }

    /// Whether pages are visited one after the other.
    pub(crate) const fn is_sequential(&self) -> bool {
        self.order == order::SEQ
    }

    /// The page that write number `index` goes to, counted from the start of the part.
    #[inline(always)]
    pub(crate) const fn page(&self, index: u64) -> u64 {
        if self.order == order::SEQ {
            return index % self.pages;
        }
        let draw = mix(self.key.wrapping_add(index.wrapping_mul(GOLDEN)));
        let (high, low) = (draw >> 32, draw & 0xffff_ffff);
        let cold_pages = self.pages - self.hot_pages;
        if self.order == order::RANDOM {
            (high * self.pages) >> 32
        } else if low < HOT_DRAWS || cold_pages == 0 {
            (high * self.hot_pages) >> 32
        } else {
            self.hot_pages + ((high * cold_pages) >> 32)
        }
    }
}
