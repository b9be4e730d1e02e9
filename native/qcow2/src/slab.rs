// SPDX-License-Identifier: Apache-2.0
//! A table with stable keys, whose freed places are used again. A key holds the place and a
//! generation, so that a key kept too long finds nothing instead of somebody else's entry.

/// The table.
pub(crate) struct Slab<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Slab<T> {
        Slab {
            places: Vec::new(),
            free: Vec::new(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn insert(&mut self, value: T) -> u64 {
        self.len += 1;
        if let Some(place) = self.free.pop() {
            if let Some(entry) = self.places.get_mut(place as usize) {
                entry.1 = Some(value);
                return key(place, entry.0);
            }
        }
        let place = self.places.len() as u32;
        self.places.push((0, Some(value)));
        key(place, 0)
    }

    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let (generation, value) = self.places.get(place(key))?;
        if *generation == (key >> 32) as u32 {
            value.as_ref()
        } else {
            None
        }
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (generation, value) = self.places.get_mut(place(key))?;
        if *generation == (key >> 32) as u32 {
            value.as_mut()
        } else {
            None
        }
    }

    /// The keys of all entries there are now.
    pub(crate) fn keys(&self) -> Vec<u64> {
        let used = self.places.iter().enumerate();
        used.filter(|(_, (_, value))| value.is_some())
            .map(|(n, (generation, _))| key(n as u32, *generation))
            .collect()
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let entry = self.places.get_mut(place(key))?;
        if entry.0 != (key >> 32) as u32 {
            return None;
        }
        let value = entry.1.take()?;
        entry.0 = entry.0.wrapping_add(1);
        self.free.push(place(key) as u32);
        self.len -= 1;
        Some(value)
    }
}

fn key(place: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(place)
}

fn place(key: u64) -> usize {
    (key & 0xffff_ffff) as usize
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn an_old_key_does_not_find_the_new_entry() {
        let mut slab = Slab::new();
        let first = slab.insert("first");
        assert_eq!(slab.remove(first), Some("first"));
        let second = slab.insert("second");
        assert_ne!(first, second);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&"second"));
        assert_eq!(slab.len(), 1);
    }
}
