//! A partition's memory as this process sees it: mapped regions, page lists, event flags.
