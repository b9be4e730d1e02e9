// SPDX-License-Identifier: Apache-2.0
//! A device-specific configuration that the device changes while its driver looks at it: a disk that grows, a
//! cable that is pulled.
//!
//! Fields are replaced whole under a lock, so one read of the driver's never sees half of one; several reads do,
//! and the generation tells (virtio 1.2, 2.5.1). A reset leaves it as it is: it is the host's. So does a restore; where it
//! is another than the driver knew, that is a change like any other, and the driver is told.

use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::LiveConfig;
use crate::error::Result;
use crate::state::{self, Bytes, Stateful};

/// The configuration, shared by the registers and the thread that serves the device.
#[derive(Debug)]
pub struct ChangingConfig(Mutex<State>);

#[derive(Debug)]
struct State {
    generation: u8,
    content: Vec<u8>,
    /// A driver went on with another one.
    news: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    generation: u8,
    content: Bytes,
}

impl ChangingConfig {
    /// With this content.
    pub fn new(content: Vec<u8>) -> ChangingConfig {
        ChangingConfig(Mutex::new(State {
            generation: 0,
            content,
            news: false,
        }))
    }

    /// Replaces the field at `offset`; true if it was another before.
    pub fn set(&self, offset: usize, field: &[u8]) -> bool {
        let mut state = self.lock();
        let end = offset.saturating_add(field.len());
        let Some(place) = state.content.get_mut(offset..end) else {
            return false;
        };
        if place == field {
            return false;
        }
        place.copy_from_slice(field);
        state.generation = state.generation.wrapping_add(1);
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Stateful for ChangingConfig {
    fn save(&self) -> Result<state::State> {
        let state = self.lock();
        state::write(&Saved {
            generation: state.generation,
            content: Bytes(state.content.clone()),
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let mut state = self.lock();
        state.news = saved.content.0 != state.content;
        state.generation = saved.generation.wrapping_add(u8::from(state.news));
        Ok(())
    }
}

impl LiveConfig for ChangingConfig {
    fn generation(&self) -> u8 {
        self.lock().generation
    }

    fn has_news(&self) -> bool {
        self.lock().news
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        let content = state.content.iter().skip(skipped);
        for (byte, value) in data.iter_mut().zip(content) {
            *byte = *value;
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_shows_in_the_content_and_in_the_generation() {
        let config = ChangingConfig::new(vec![1, 2, 3, 4]);
        assert!(!config.set(1, &[2, 3]), "nothing has changed");
        assert_eq!(config.generation(), 0);
        assert!(config.set(1, &[7, 8]));
        config.write(0, &[9]);
        let mut data = [0; 6];
        config.read(0, &mut data);
        assert_eq!((config.generation(), data), (1, [1, 7, 8, 4, 0, 0]));
        assert!(!config.set(3, &[0, 0]), "there is no such field");
        config.read(u64::MAX, &mut data);
    }

    #[test]
    fn a_driver_that_goes_on_with_another_content_hears_of_it() {
        let before = ChangingConfig::new(vec![1, 2]);
        assert!(before.set(0, &[3]));
        let same = ChangingConfig::new(vec![3, 2]);
        same.restore(&before.save().unwrap()).unwrap();
        assert_eq!((same.generation(), same.has_news()), (1, false));
        let other = ChangingConfig::new(vec![1, 2]);
        other.restore(&before.save().unwrap()).unwrap();
        assert_eq!((other.generation(), other.has_news()), (2, true));
        assert!(other.restore(&state::State::Null).is_err());
    }
}
