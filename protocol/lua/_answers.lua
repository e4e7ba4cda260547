-- Cached answers: `c:<key>` is a hash of the journals of one answer, with a TTL. `answers` says which there are, by when
-- they expire; `answers:sizes` their bytes, and under `*` the sum.

local function forget_answer(key)
  local size = redis.call('HGET', P .. 'answers:sizes', key)
  redis.call('DEL', P .. 'c:' .. key)
  redis.call('ZREM', P .. 'answers', key)
  if not size then return end
  redis.call('HDEL', P .. 'answers:sizes', key)
  redis.call('HINCRBY', P .. 'answers:sizes', '*', -tonumber(size))
end

-- Drop the `count` answers that expire first, or all that have expired by `now` if that is given.
local function forget_first(count, now)
  local keys
  if now then
    keys = redis.call('ZRANGEBYSCORE', P .. 'answers', '-inf', now, 'LIMIT', 0, count)
  else
    keys = redis.call('ZRANGE', P .. 'answers', 0, count - 1)
  end
  for _, key in ipairs(keys) do forget_answer(key) end
  return #keys
end
